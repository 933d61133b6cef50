"""The command line: `fedalt --help` lists its commands."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.chat import chat
from fedalt.cli.client import generate
from fedalt.cli.compare import compare, tune
from fedalt.cli.data import app as data
from fedalt.cli.demo import demo
from fedalt.cli.errors import report as report_fault
from fedalt.cli.export import export
from fedalt.cli.federation import app as federation
from fedalt.cli.federation import client, server, simulate
from fedalt.cli.flags import ServeCommand, SettingsCommand
from fedalt.cli.membership import join, leave
from fedalt.cli.methods import methods
from fedalt.cli.privacy import app as privacy
from fedalt.cli.report import report
from fedalt.cli.resume import evaluate, resume
from fedalt.cli.run import run
from fedalt.cli.serve import serve
from fedalt.cli.track import track
from fedalt.cli.watch import watch
from fedalt.report.docstrings import docstring

app = typer.Typer(
    name="fedalt",
    help="Personalised federated fine-tuning of language models: one better model per client.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # Click does it; both would say it twice
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(help=docstring(demo))(demo)
app.command(help=docstring(run), cls=SettingsCommand)(run)
for command in (
    *(resume, evaluate, generate, export, join, leave, compare, tune, chat),
    *(simulate, server, client, watch, track, report),
):
    app.command(help=docstring(command))(command)
app.command(help=docstring(serve), cls=ServeCommand)(serve)
app.add_typer(data, name="data")
app.add_typer(federation, name="federation")
app.add_typer(privacy, name="privacy")
app.command(help=docstring(methods))(methods)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 for a mistake of the user's, 1 for one of ours, 130 stopped.

    75 where the same command may work later. `--debug`, anywhere, shows the traceback of an error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # whoever started the command has closed it
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal cannot show is no reason to end
            stream.reconfigure(errors="backslashreplace")
    if threading.current_thread() is threading.main_thread():
        # A scheduler's signal ends what a command has started, as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    try:
        app(args=words, prog_name="fedalt")
    except Exception as error:
        if len(words) < len(given):
            raise
        sys.exit(report_fault(error))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedalt {version('fedalt')}")
        raise typer.Exit


@app.callback()
def _options(
    _show: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
) -> None:
    """What can be given before any command."""
