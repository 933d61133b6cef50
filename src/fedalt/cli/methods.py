"""`fedalt methods`: what can be given as `--method`."""

from typing import Annotated

import typer

from fedalt.cli.output import show_json


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods and the settings of each."""
    from fedalt.methods import METHODS

    if as_json:
        show_json(
            {
                name: {"what": entry.title, "settings": entry.settings}
                for name, entry in METHODS.entries.items()
            }
        )
        return
    for name, entry in METHODS.entries.items():
        typer.echo(f"{name:17} {entry.title}")
        if entry.settings:
            shown = ", ".join(f"{key} = {_toml(value)}" for key, value in entry.settings.items())
            typer.echo(f"{'':17} [method] {shown}")


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case None | {}:
            return "(unset)"
        case _:
            return str(value)
