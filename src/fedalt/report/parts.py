"""What a page is made of: sections with facts, sentences, tables, figures and examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MANY_ROWS = 24  # of a table, beyond which it scrolls in a place of its own


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    items: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True)
class Notes:
    """Sentences, one paragraph each."""

    sentences: Sequence[str]
    quiet: bool = False
    kind: Literal["notes"] = "notes"


@dataclass(frozen=True)
class Cell:
    """A cell as it is shown, and what its column is sorted by; None sorts last."""

    text: str
    value: float | str | None
    strong: bool = False

    @classmethod
    def of(cls, number: int | None) -> "Cell":
        """A count, which may not be known."""
        return cls("–" if number is None else f"{number:,}", number)


@dataclass(frozen=True)
class Table:
    """Rows that sort by any column; the feet stay below. Numbers stand to the right.

    One of few columns takes half the page's width, unless it is `wide`.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    feet: Sequence[Sequence[Cell]] = ()
    wide: bool = False
    kind: Literal["table"] = "table"

    @property
    def shape(self) -> str:
        """How it is laid out: few columns, many, or neither; rows that scroll if they are many."""
        columns = len(self.heads)
        across = "many" if columns > 8 else "few" if columns <= 6 and not self.wide else "wide"
        return f"{across} tall" if len(self.rows) > MANY_ROWS else across

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers."""
        return [
            all(not isinstance(row[at].value, str) for row in self.rows)
            for at in range(len(self.heads))
        ]


@dataclass(frozen=True)
class Figure:
    """An Altair chart with its name, which is also that of its file, its title and a caption."""

    name: str
    title: str
    caption: str
    chart: Any
    wide: bool = False
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True)
class Token:
    """A piece of text and the weight that it is coloured by, from 0 to 1."""

    text: str
    weight: float

    @property
    def digits(self) -> str:
        """Two digits behind the point; 1 is shown as .99."""
        return f"{min(max(self.weight, 0.0), 0.99):.2f}"[2:]


@dataclass(frozen=True)
class Example:
    """A test example: what was asked, what was right, what was answered."""

    rank: str
    loss: float
    prompt: str
    reference: str
    prediction: str | None
    tokens: Sequence[Token] = ()
    cut: bool = False


@dataclass(frozen=True)
class Examples:
    """Test examples of each client; `slots` name the two ends of the tokens' colours."""

    clients: Sequence[tuple[str, Sequence[Example]]]
    slots: tuple[str, str] | None = None
    kind: Literal["examples"] = "examples"


@dataclass(frozen=True)
class Masked:
    """A text in two parts: what carries no loss, and the answer."""

    title: str
    masked: str
    answer: str
    kind: Literal["masked"] = "masked"


Part = Facts | Notes | Table | Figure | Examples | Masked


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading."""

    anchor: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page; `key` holds a few large numbers at its top."""

    title: str
    over: str
    lead: str
    key: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    foot: str = field(default="")

    def figures(self) -> list[Figure]:
        """Every figure, in order."""
        return [
            part for section in self.sections for part in section.parts if part.kind == "figure"
        ]
