"""Write docs/settings.md, the tables of all settings, from their declarations; `make docs` does."""

from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from pathlib import Path

from fedalt.cli.flags import default_of, flag_of, shown_value
from fedalt.core.declared import Declared, declared_in, words_of
from fedalt.federation.rules import Rules
from fedalt.flower.places import ClientPlace, ServerPlace
from fedalt.methods import METHODS
from fedalt.runs.settings import all_declared
from fedalt.serving.settings import ServeSettings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
_HEAD = """\
# Settings

Every setting of a run has a key in a TOML file, which `fedalt run CONFIG.toml` reads. Most have a
flag of `fedalt run` too; flags override the file. A run keeps all its settings in
`RUN/settings.toml`. An unknown key is an error. `python scripts/settings_page.py` writes this page
from the declarations in `src/fedalt/core/settings.py` and `upload_settings.py` beside it.
"""
_RUN = """
## A run

Defaults after `tiny:` are those that the built-in base model recommends.
"""
_METHODS = """
## Settings of one method

They are keys of `[method]` beside `name`, `rank`, `alpha` and `dropout`.
[methods.md](methods.md) says what they mean.

| method | settings and defaults |
|---|---|
"""
_FEDERATION = """
## A federation

The server's `federation.toml` has the sections `[server]`, `[rules]` and `[firewall]` (as above), a
client's `client.toml` has `[client]`. Relative paths are relative to the folder of the file.
"""


_SERVER = """
## A server

Flags of `fedalt serve` ([serving.md](serving.md)); it has no file of settings.
"""


def page() -> str:
    """The whole page."""
    sections = list(dict.fromkeys(section for section, _ in all_declared()))
    parts = [_HEAD, _RUN]
    for section in sections:
        settings = [item for home, item in all_declared() if home == section]
        parts.append(_table(section, settings, flags=True))
    parts.append(_METHODS)
    parts += [
        f"| `{name}` | {', '.join(_assigned(entry.settings)) or 'none'} |\n"
        for name, entry in METHODS.entries.items()
    ]
    parts.append(_FEDERATION)
    for section, cls in (("server", ServerPlace), ("rules", Rules), ("client", ClientPlace)):
        parts.append(_table(section, declared_in(cls), flags=False))
    parts += [_SERVER, _table("serve", declared_in(ServeSettings), flags=True)]
    return "".join(parts)


def _table(section: str, settings: Iterable[Declared], *, flags: bool) -> str:
    """One section's settings."""
    title = f"`[{section}]`" if section else "At the top of the file"
    heads = ["key", *(["flag"] if flags else []), "value", "default", "meaning"]
    rows = [heads, ["---"] * len(heads)]
    rows += [_row(section, item, flags=flags) for item in settings]
    lines = [f"| {' | '.join(cells)} |\n" for cells in rows]
    return f"\n### {title}\n\n{''.join(lines)}"


def _row(section: str, item: Declared, *, flags: bool) -> list[str]:
    """The cells of one setting."""
    kinds = " or ".join(words_of(kind) for kind in item.types).replace("|", "\\|")
    kinds += f", {item.limits}" if item.limits else ""
    default = "required" if item.default is MISSING else default_of(item, section)
    flag = [f"`{flag_of(item)}`" if item.flag else ""] if flags else []
    return [f"`{item.name}`", *flag, kinds, f"{default}", item.help]


def _assigned(settings: dict[str, object]) -> Iterator[str]:
    for name, value in settings.items():
        yield f"`{name}` = {'unset' if value in (None, {}) else shown_value(value)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
