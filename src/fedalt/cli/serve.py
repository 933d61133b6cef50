"""`fedalt serve`: an OpenAI-compatible server for the models of all clients."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.flags import given
from fedalt.cli.output import hush_libraries, note


def serve(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|EXPORTS",
            help="The folder of a run, a folder of exported models, or a client.toml.",
        ),
    ],
) -> None:
    """Serve the models of all clients with OpenAI's HTTP interface.

    `model` in a request picks the client; requests of different clients share each pass through the
    base model. Ctrl-C ends it once those are answered who are being answered.
    """
    hush_libraries()
    from fedalt.serving.settings import ServeSettings

    settings = ServeSettings(**given(context).get("serve", {}))
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed: `pip install 'fedalt[serve]'`")
    from fedalt.serving.server import serve as serve_until_a_signal

    if not serve_until_a_signal(path, settings, note):
        raise typer.Exit(1)
