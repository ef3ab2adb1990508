"""How long tests wait for what should come by itself.

A limit is there to end a run that hangs, not to measure: it is far above what a busy machine needs.
"""

import os


def patience():
    """Seconds to wait for an event; ``DEVEC_PATIENCE=2`` doubles them."""
    return 1200 * float(os.environ.get("DEVEC_PATIENCE", "1"))
