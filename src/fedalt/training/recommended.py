"""The settings that suit the built-in base model, for whatever a user leaves unsaid."""

import tomllib
from collections.abc import Mapping
from typing import Any

from fedalt.core.settings import BUILT_IN, BUILT_IN_FOLDER

FILE = "recommended.toml"


def recommended(table: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A table of settings with what its base model recommends for all that it leaves unsaid.

    Whatever the table says stays, also where it says what is the default anyway. Also a sentence
    about what was added, "" for nothing: only the built-in base model recommends something. What
    is no section is left to whoever checks the table.
    """
    filled, told = dict(table), []
    for section, advised in _advice(table).items():
        given = table.get(section, {})
        if not isinstance(given, dict):
            continue
        added = {key: value for key, value in advised.items() if key not in given}
        if section == "method" and "alpha" in added and _is_number(given.get("rank")):
            # What suits the model is alpha / rank, by which an adapter's output is multiplied.
            added["alpha"] = advised["alpha"] * given["rank"] / advised["rank"]
        filled[section] = {**added, **given}
        told += [
            f"{key} = {value:g}" if _is_number(value) else f"{key} = {value}"
            for key, value in added.items()
        ]
    if not told:
        return filled, ""
    return filled, (
        f"settings recommended for the base model {BUILT_IN!r}, as none were given: "
        f"{', '.join(told)}; a flag or a file of settings says otherwise"
    )


def _advice(table: Mapping[str, Any]) -> Mapping[str, Any]:
    model = table.get("model", {})
    if not isinstance(model, dict) or model.get("name", BUILT_IN) != BUILT_IN:
        return {}
    return tomllib.loads((BUILT_IN_FOLDER / FILE).read_text(encoding="utf-8"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
