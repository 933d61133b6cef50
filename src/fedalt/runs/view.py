"""How a comparison is read: the metric that heads its table, and what its methods have equal."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

from fedalt.core.declared import typed
from fedalt.runs.settings import read_table

Metric = Literal["score", "accuracy", "rouge1", "rougeL", "loss"]


@dataclass(frozen=True)
class View:
    """What a comparison's file says at its top about the whole of it.

    `metric` heads the table: "score" is accuracy where a client's records list options or labels,
    ROUGE-L elsewhere. With `steps` "equal" methods that train more in a round get fewer rounds,
    with "rounds" all get as many.
    """

    metric: Metric = "score"
    steps: Literal["equal", "rounds"] = "equal"


USUAL: Final = View()
VIEW: Final = tuple(item.name for item in fields(View))


def view_of(table: Mapping[str, Any], source: str) -> View:
    """The view that a comparison's table asks for. Raises SettingsError that begins with source."""
    hints = get_type_hints(View)
    given = {key: typed(table[key], hints[key], f"{source}: {key}") for key in VIEW if key in table}
    return View(**given)


def view_in(file: Path) -> View:
    """The view that a comparison's file asks for. Raises SettingsError."""
    return view_of(read_table(file), str(file))
