"""`fedalt methods`: what can stand behind `--method`."""

import sys
from typing import Annotated

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods and the settings of each."""
    from fedalt.cli.output import hush_libraries, show_json

    hush_libraries()
    from fedalt.methods import METHODS
    from fedalt.report.docstrings import opening
    from fedalt.runs.settings import settings_of_method

    what, settings = {}, {}
    for name, method in METHODS.items():
        what[name] = opening(sys.modules[type(method).__module__])
        settings[name] = {own: getattr(method, own) for own in settings_of_method(method)}
    if as_json:
        show_json({name: {"what": what[name], "settings": settings[name]} for name in METHODS})
        return
    for name in METHODS:
        typer.echo(f"{name:17} {what[name]}")
        if settings[name]:
            shown = ", ".join(f"{key} = {_toml(value)}" for key, value in settings[name].items())
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
