"""`fedalt methods`: what can stand behind `--method`."""

import sys
from dataclasses import fields
from typing import Annotated

import typer


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods and the settings of each."""
    from fedalt.cli.output import hush_libraries, show_json

    hush_libraries()
    from fedalt.methods import METHODS

    listed = {}
    for name, cls in METHODS.items():
        page = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
        own = {f.name: f.default for f in fields(cls) if f.name != "lora"}  # type: ignore[arg-type]  # a protocol hides that it is a dataclass
        listed[name] = {"what": page, "settings": own}
    if as_json:
        show_json(listed)
        return
    for name, about in listed.items():
        typer.echo(f"{name:10} {about['what']}")
        settings = ", ".join(f"{key} = {_toml(value)}" for key, value in about["settings"].items())
        if settings:
            typer.echo(f"{'':10} [method] {settings}")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"'
