"""How many threads torch uses in one thread of Python, apart from what it uses in others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

_SETTING = Lock()


def use_threads(count: int) -> None:
    """Set the number of threads that torch uses in the calling thread.

    `torch.set_num_threads` sets the number of the calling thread and that of all threads that first
    use torch later. Another thread reads the latter first and sets it again afterwards. So the
    setting of the process is the same before and after, however many threads call this at once; a
    thread that first uses torch in between, within some milliseconds, takes on this number.

    Args:
        count: The number.

    Cost: about 0.2 ms; nothing if the number is the same already.
    """
    if torch.get_num_threads() == count:
        return
    with _SETTING, ThreadPoolExecutor(1, "devec-threads") as other:
        default = other.submit(torch.get_num_threads).result()
        torch.set_num_threads(count)
        other.submit(torch.set_num_threads, default).result()
