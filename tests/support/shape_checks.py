"""Checks of shapes: which modules name them in their signatures, and how calls are held to them."""

import contextlib

from beartype import BeartypeConf, beartype
from jaxtyping import config, install_import_hook

# Not of `Delta`, which takes numbers of NumPy and torch where it declares floats, and checks the
# shapes of its factors itself.
MODULES = [
    "devec.linalg",
    "devec.deltas.base_weight",
    "devec.deltas.gains",
    "devec.deltas.matrix",
    "devec.decomposition.findings",
    "devec.decomposition.scopes",
    "devec.decomposition.stacks",
    "devec.operations.overlap",
]


def checked(function):
    """The function, its arguments and results checked; an int where a float is declared is fine."""
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def install():
    """Have the modules checked as they are imported, which must be later than this."""
    install_import_hook(MODULES, f"{__name__}.checked")


@contextlib.contextmanager
def unchecked():
    """Calls are not held to the shapes, so that what devec itself says of wrong ones is seen."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)
