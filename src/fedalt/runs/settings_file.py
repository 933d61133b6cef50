"""A file of settings as a table, unchecked, with absolute paths."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalt.core.declared import SettingsError
from fedalt.core.reading import content
from fedalt.core.settings import BUILT_IN, HUB, PACKAGED
from fedalt.data.encodings import decoded


def read_table(file: Path) -> dict[str, Any]:
    """What a file of settings says, unchecked, with its relative paths made absolute."""
    return rooted(parsed(file), file.parent)


def rooted(table: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A table of settings with paths relative to `root` made absolute; a hub id is no path.

    Keys that older versions have written get their present names.
    """
    whole = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    if "yardstick" in whole:
        whole.setdefault("local_baseline", whole.pop("yardstick"))
    data = whole.get("data")
    if isinstance(data, Mapping) and "client_field" in data:
        rest = {key: value for key, value in data.items() if key != "client_field"}
        whole["data"] = {"client_column": data["client_field"], **rest}
    if isinstance(methods := table.get("methods"), list):  # a comparison's, each like a table
        whole["methods"] = [rooted(m, root) if isinstance(m, dict) else m for m in methods]
    for section, key in (("data", "path"), ("data", "template"), ("model", "name")):
        part = whole.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, str | Path) or str(value) in ("", BUILT_IN, *PACKAGED):
            continue
        if section == "data" and str(value).startswith(HUB):
            continue
        try:
            home = Path(value).expanduser()
        except RuntimeError:
            raise SettingsError(f"[{section}] {key}: {str(value)!r}: no such user's home") from None
        path = Path(os.path.abspath(root / home))  # noqa: PTH100 - keeps links
        if section == "data" or path.exists() or str(value).startswith((".", "~")):
            whole[section] = {**whole[section], key: str(path)}
    return whole


def parsed(file: Path) -> dict[str, Any]:
    """What a TOML file says. Raises SettingsError."""
    try:
        return tomllib.loads(decoded(content(file)))
    except FileNotFoundError:
        raise SettingsError(f"{file}: there is no such file") from None
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise SettingsError(f"{file}: nested deeper than any settings") from None
    except ValueError as error:  # of TOML, of its encoding, or of a number of thousands of digits
        raise SettingsError(f"{file}: not valid TOML: {error}") from None
