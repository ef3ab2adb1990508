"""The command line, one file for each command: parse, call, print.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import signal
import sys
import warnings
from collections.abc import Callable

import typer

from devec._version import __version__
from devec.cli.combine import combine_command
from devec.cli.compress import compress_command
from devec.cli.convert import convert_command
from devec.cli.decompose import decompose_command
from devec.cli.demo import demo_command
from devec.cli.inspect import inspect_command
from devec.cli.negate import negate_command
from devec.cli.overlap import overlap_command
from devec.errors import DevecError, IncompatibleError, listed
from devec.streaming.processes import is_first, launched

app = typer.Typer(
    name="devec",
    help="Adapter algebra: split LoRA adapters into what they share and what is unique to each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "decompose": decompose_command,
    "combine": combine_command,
    "negate": negate_command,
    "compress": compress_command,
    "convert": convert_command,
    "overlap": overlap_command,
    "inspect": inspect_command,
    "demo": demo_command,
}
for name, command in _COMMANDS.items():
    app.command(name)(command)


def _version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        typer.echo(f"devec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(  # noqa: ARG001
        False, "--version", help="Show the version.", callback=_version, is_eager=True
    ),
) -> None:
    """Adapter algebra: split LoRA adapters into what they share and what is unique to each."""
    command = context.invoked_subcommand
    if launched() > 1 and command != "decompose":
        raise IncompatibleError(
            f"{launched()} processes were launched, which only 'decompose' divides its work among; "
            f"run 'devec {command}' by itself"
        )


def main() -> None:
    """Run the command line; exit with 2 and one message on any error a user can cause."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "²" is no reason to stop
    try:
        app()
    except (DevecError, OSError) as error:  # OSError: a path that no system call accepts
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except _Stopped as stopped:
        typer.echo(f"error: {_stopped(stopped.code)}", err=True)
        raise


class _Stopped(SystemExit):
    """Raised on a signal, so that the command ends like on an error and removes temporary files."""


def _stop(number: int, _: object) -> None:
    """End the command; `main` prints the completed outputs once all others are removed."""
    raise _Stopped(128 + number)


def _stopped(code: object) -> str:
    """The message of a command that was stopped, with the outputs that it had completed."""
    what = "interrupted" if code == 128 + signal.SIGINT else "terminated"
    if not is_first():  # of several processes, only the first commits outputs
        return what
    from devec.files.staging import COMMITTED

    complete = list(map(str, COMMITTED))
    return f"{what}; {f'written: {listed(complete)}' if complete else 'nothing was written'}"


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Print a warning as one line, except warnings for developers of libraries."""
    # of several processes, only the first prints
    if is_first() and not issubclass(category, (DeprecationWarning, FutureWarning)):
        typer.echo(f"warning: {message}", err=True)
