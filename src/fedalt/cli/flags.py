"""Arguments and flags that several commands have, and a flag for every declared setting."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

import click
import typer
from typer.core import TyperCommand, TyperOption

from fedalt.report.trackers import TrackerName

if TYPE_CHECKING:
    from fedalt.core.declared import Declared

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel="Output")
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print the result alone.", rich_help_panel="Output"),
]
ReportTo = Annotated[
    list[TrackerName] | None,
    typer.Option(
        "--report-to",
        help="Also write RUN/tensorboard or RUN/trackio; can be repeated.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
PANELS: Final = {
    "data": "Data",
    "model": "Base model",
    "method": "Method",
    "": "Run",
    "training": "Training",
    "rounds": "Rounds",
    "scoring": "Scoring",
    "serve": "Server",
}
_GIVEN: Final = "fedalt.settings"


class SettingsCommand(TyperCommand):
    """A command with a flag for every declared setting that has one; see `given`."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The arguments, the flags of settings, and the command's own flags."""
        own = super().get_params(ctx)
        arguments = [param for param in own if isinstance(param, click.Argument)]
        others = [param for param in own if not isinstance(param, click.Argument)]
        return [*arguments, *self.flags(), *others]

    def flags(self) -> Sequence[TyperOption]:
        """Those of a run's settings."""
        return setting_flags()


class ServeCommand(SettingsCommand):
    """The same with the settings of a server."""

    def flags(self) -> Sequence[TyperOption]:
        """Those of a server's settings."""
        from fedalt.core.declared import declared_in
        from fedalt.serving.settings import ServeSettings

        return [_flag("serve", item) for item in declared_in(ServeSettings)]


def given(context: typer.Context) -> dict[str, Any]:
    """The settings that were given as flags, as a table like that of a settings file."""
    return dict(context.meta.get(_GIVEN, {}))


@cache
def setting_flags() -> tuple[TyperOption, ...]:
    """One option for each declared setting that is not for TOML only."""
    from fedalt.runs.settings import all_declared

    flags = [_flag(section, item) for section, item in all_declared() if item.flag]
    # The name that older versions had for it.
    old = _option("--yardstick/--no-yardstick", "", "local_baseline", is_flag=True, hidden=True)
    return (*flags, old)


def numbers_of(text: str, kind: Any, flag: str) -> list[Any]:
    """Numbers above 0, separated by commas, each once."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{flag}: expected numbers with commas, got {text!r}") from None
    if min(numbers) <= 0:
        raise typer.BadParameter(f"{flag}: {min(numbers)}, but it must be above 0")
    return list(dict.fromkeys(numbers))


def names_of(text: str) -> list[str]:
    """Names, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def default_of(item: "Declared", section: str = "") -> str:
    """The default of a setting as `--help` shows it, "" without any."""
    advised = _advice().get(section, {}).get(item.name)
    usual = "" if item.default in (MISSING, None) else shown_value(item.default)
    own = "" if advised in (None, item.default) else f"tiny: {shown_value(advised)}"
    return ", ".join(filter(None, (usual, own)))


def shown_value(value: object) -> str:
    """A value as TOML has it, texts without their quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def flag_of(item: "Declared") -> str:
    """A setting on the command line."""
    flag = item.flag or ""
    return f"{flag}/--no-{flag.removeprefix('--')}" if bool in item.types else flag


@cache
def _advice() -> Mapping[str, Mapping[str, object]]:
    """What the built-in base model recommends, by section and key."""
    from fedalt.core.settings import BUILT_IN_FOLDER
    from fedalt.training.recommended import FILE

    return tomllib.loads((BUILT_IN_FOLDER / FILE).read_text(encoding="utf-8"))


def _flag(section: str, item: "Declared") -> TyperOption:
    """The option of one setting."""
    kind = item.types[0]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return _option(
        flag_of(item),
        section,
        item.name,
        type={int: click.INT, float: click.FLOAT}.get(kind, click.STRING),
        is_flag=kind is bool,
        metavar=f"[{'|'.join(choices)}]" if choices else None,
        help=item.help,
        show_default=default_of(item, section) or False,
        rich_help_panel=PANELS[section],
    )


def _option(name: str, section: str, key: str, **about: Any) -> TyperOption:
    """An option whose value goes into the table of `given`."""

    def keep(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value is None:
            return
        if key == "targets" and value not in ("all-linear", "default"):
            value = names_of(value)
        table = context.meta.setdefault(_GIVEN, {})
        (table.setdefault(section, {}) if section else table)[key] = value

    if about["is_flag"]:
        about["type"] = click.BOOL
    return TyperOption(param_decls=[name], default=None, expose_value=False, callback=keep, **about)
