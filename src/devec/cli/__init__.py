"""The command line: one file a command, each of which parses, calls and prints.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import signal
import sys
import warnings

import typer

from devec._version import __version__
from devec.cli.combine import combine
from devec.cli.compress import compress
from devec.cli.convert import convert
from devec.cli.decompose import decompose
from devec.cli.demo import demo
from devec.cli.inspect import inspect
from devec.cli.negate import negate
from devec.cli.overlap import overlap
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

for command in (decompose, combine, negate, compress, convert, overlap, inspect, demo):
    app.command()(command)


def _version(wanted: bool) -> None:
    """Print the version and stop."""
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
    except (DevecError, OSError) as error:  # OSError: a path that no system call takes
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except _Stopped as stopped:
        typer.echo(f"error: {_stopped(stopped.code)}", err=True)
        raise


class _Stopped(SystemExit):
    """A signal that ends the command as an error does, so that temporary files are removed."""


def _stop(number: int, _: object) -> None:
    """End the command; what it has written is known once everything else is undone."""
    raise _Stopped(128 + number)


def _stopped(code: object) -> str:
    """What a command that was stopped says, with the outputs that it had completed."""
    what = "interrupted" if code == 128 + signal.SIGINT else "terminated"
    if not is_first():  # of several processes only the first gives outputs their names
        return what
    from devec.files.staging import COMMITTED

    complete = list(map(str, COMMITTED))
    return f"{what}; {f'written: {listed(complete)}' if complete else 'nothing was written'}"


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Print a warning as one line; what libraries say to their developers is not for users."""
    # of several processes the first speaks for all
    if is_first() and not issubclass(category, (DeprecationWarning, FutureWarning)):
        typer.echo(f"warning: {message}", err=True)
