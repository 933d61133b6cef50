"""`fedalt methods`: what can stand behind `--method`."""

import sys
from dataclasses import fields
from typing import Annotated, Any

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods and the settings of each."""
    from fedalt.cli.output import hush_libraries, show_json

    hush_libraries()
    from fedalt.methods import METHODS

    what, settings = {}, {}
    for name, cls in METHODS.items():
        what[name] = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        own: Any = fields(cls)  # type: ignore[arg-type]  # the protocol hides the dataclass
        settings[name] = {each.name: each.default for each in own if each.name != "lora"}
    if as_json:
        show_json({name: {"what": what[name], "settings": settings[name]} for name in METHODS})
        return
    for name in METHODS:
        typer.echo(f"{name:8} {what[name]}")
        if settings[name]:
            shown = ", ".join(f"{key} = {_toml(value)}" for key, value in settings[name].items())
            typer.echo(f"{'':8} [method] {shown}")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
