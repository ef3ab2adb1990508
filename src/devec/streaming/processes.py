"""Several processes that share one job, as ``accelerate launch`` or ``torchrun`` start them.

The processes run on one file system. Each does a share of the work; the first one gathers the
findings of all and completes the outputs.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import finalize

from devec.errors import DevecError

if TYPE_CHECKING:
    import torch

V = TypeVar("V")

# How long a process waits for others, which may read and write for much longer.
_PATIENCE = timedelta(days=1)


def launched() -> int:
    """Number of processes that were launched for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the first process, which prints and returns the results."""
    return os.environ.get("RANK", "0") == "0"


class Failure(NamedTuple):
    """An error in one process, as it is sent to the others.

    Attributes:
        kind: Name of the exception class.
        text: The message.
    """

    kind: str
    text: str


class Team:
    """The processes of a job; a context manager that closes their connections.

    Threads of a process group that still run when the interpreter ends abort the process, and the
    launcher then stops the others. So a team destroys its group when it is closed. The default
    group, which torch cannot create twice in one job, is destroyed when the interpreter exits.

    Args:
        size: Number of processes that were launched; 1 for no others.

    Raises:
        DevecError: If the others cannot be reached.
    """

    def __init__(self, size: int = 1) -> None:
        """Connect to the other processes."""
        self.rank, self.size = 0, size
        self._group: Any = None
        self._destroy: Callable[[], object] = lambda: None
        if size == 1:
            return
        import torch
        from accelerate import PartialState

        given = torch.distributed.is_initialized()  # by the caller, who uses and destroys it
        try:
            state = PartialState(cpu=not torch.cuda.is_available())
            if not given:
                atexit.register(_destroy, None)
            self.rank, self._device = state.process_index, state.device
            self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
            self._destroy = finalize(self, _destroy, self._group)  # at exit if nobody closes it
        except (RuntimeError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DevecError(
                f"WORLD_SIZE says that {size} processes were launched, but they cannot be reached "
                f"({reason}); launch them with torchrun or accelerate launch, or unset WORLD_SIZE"
            ) from error

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Destroy the process group of this team, which cannot be used afterwards."""
        self._group = None  # its threads end with the last reference
        self._destroy()

    @property
    def is_first(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def share(self, items: Sequence[V]) -> Sequence[V]:
        """The items on which this process works."""
        return items[self.rank :: self.size]

    def device(self, wanted: str | torch.device | None) -> str | torch.device | None:
        """The device of this process; of several GPUs a different one for each process."""
        if self.size > 1 and str(wanted) == "cuda":
            return self._device  # type: ignore[no-any-return]
        return wanted

    def gather(self, call: Callable[[], V], state: str = "nothing was written") -> list[V]:
        """Call a function in all processes, and return all results to each of them.

        Args:
            call: The function. If it raises an error here, the others do not wait for a result.
            state: What the message says of the outputs if another process has ended.

        Returns:
            The results, by rank.

        Raises:
            DevecError: If another process failed or has ended.
            Exception: Any error of the function in this process.
        """
        if self.size == 1:
            return [call()]
        try:
            value: V | Failure = call()
        except Exception as error:
            with suppress(DevecError):
                self._exchanged(Failure(type(error).__name__, str(error)), state)
            raise
        values = self._exchanged(value, state)
        for rank, other in enumerate(values):
            if isinstance(other, Failure):
                raise DevecError(
                    f"process {rank} of {self.size} failed: {other.text or other.kind}"
                )
        return values

    def _exchanged(self, value: Any, state: str) -> list[Any]:  # noqa: ANN401
        """The values of all processes."""
        import torch

        values: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(values, value, group=self._group)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DevecError(
                f"another of the {self.size} processes ended before its work was done, {state} "
                f"({reason})"
            ) from error
        return values


def _destroy(group: Any) -> None:  # noqa: ANN401
    """Destroy a process group if it still exists; None stands for the default group."""
    import torch

    if torch.distributed.is_initialized():
        with suppress(ValueError):  # a group of a default group that the caller has destroyed
            torch.distributed.destroy_process_group(group)
