"""Several processes that share one job, as ``accelerate launch`` or ``torchrun`` start them.

They run on one file system. Every process does a share of the work, the first one gathers what the
others found and completes the result.
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

# One process may read and write much longer than others that wait for it.
_PATIENCE = timedelta(days=1)


def launched() -> int:
    """How many processes were launched for this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the first of the processes, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


class Failure(NamedTuple):
    """An error in one of the processes, as the others are told of it.

    Attributes:
        kind: What kind of error it is.
        text: What it says.
    """

    kind: str
    text: str


class Team:
    """The processes of a job; a context manager that closes their connections.

    Threads of process groups that are still running when the interpreter has ended abort the
    process, and a launcher then stops the others. So a team destroys its group, and the default
    group, which torch cannot make twice in one job, is destroyed when the interpreter exits.

    Args:
        size: How many were launched; one is alone.

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
        """Destroy the process group of this team, which is not used afterwards."""
        self._group = None  # its threads end with the last reference
        self._destroy()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[V]) -> Sequence[V]:
        """The items that are this process's to do."""
        return items[self.rank :: self.size]

    def device(self, wanted: str | torch.device | None) -> str | torch.device | None:
        """The device of this process: of several GPUs its own."""
        if self.size > 1 and str(wanted) == "cuda":
            return self._device  # type: ignore[no-any-return]
        return wanted

    def gather(self, call: Callable[[], V], state: str = "nothing was written") -> list[V]:
        """The results of a call in all processes, in every one of them.

        Args:
            call: The call. Whatever error it ends with here, the others do not wait for it.
            state: What is said of the outputs if another process is gone.

        Returns:
            All results, by rank.

        Raises:
            DevecError: If another process failed, or is gone.
            Exception: That which the call has raised here.
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
        """What all processes give."""
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
    """Destroy a process group if it is still there; None stands for the default group."""
    import torch

    if torch.distributed.is_initialized():
        with suppress(ValueError):  # a group of a default group that the caller has destroyed
            torch.distributed.destroy_process_group(group)
