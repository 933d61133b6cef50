"""A table for a terminal of any width, as Markdown, or as CSV.

On a terminal, rows stand below each other where columns have no room. No cell is ever cut, and
none is read as markup: names and labels are other people's.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fedalt.core.foreign import shown

_LEAST = 12  # columns that a text to be read in lines is given
_LONGEST_CELL = 2000  # characters
_MARKUP = re.compile(r"([\\|`*\[\]])")  # an underscore within a word is none


@dataclass(frozen=True)
class Sheet:
    """Cells below heads; the first column names its row.

    `left` are columns whose cells stand to the left; `folded` those whose texts may take several
    lines. A section ends before each of the rows `breaks`. Without heads it is a plain list.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    title: str = ""
    left: Collection[int] = (0,)
    folded: Collection[int] = ()
    breaks: Collection[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Side by side if that fits, else one below the other."""
        if self._least() <= options.max_width:
            yield self._table()
        else:
            yield from self._below()

    def _least(self) -> int:
        """The fewest columns in which no cell is cut and no word of a folded one broken."""
        between = 3 * len(self.heads) + 1  # blanks around each cell, and what the box takes
        return between + sum(map(self._least_of, range(len(self.heads))))

    def _least_of(self, column: int) -> int:
        cells = [self.heads[column], *(_cell(row[column]).plain for row in self.rows)]
        whole = max(map(cell_len, cells))
        if column not in self.folded:
            return whole
        words = (cell_len(word) for cell in cells for word in cell.split())
        return max(min(whole, _LEAST), max(words, default=0))

    def _table(self) -> Table:
        title = Text(shown(self.title, _LONGEST_CELL), style="bold") if self.title else None
        drawn = Table(
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD if any(self.heads) else None,
            show_header=any(self.heads),
            padding=(0, 1),
        )
        for at, head in enumerate(self.heads):
            drawn.add_column(
                _cell(head),
                justify="left" if at in self.left else "right",
                no_wrap=at not in self.folded,
                overflow="fold",
            )
        for number, row in enumerate(self.rows):
            if number in self.breaks:
                drawn.add_section()
            drawn.add_row(*map(_cell, row))
        return drawn

    def _below(self) -> RenderResult:
        """Each row's name, and its cells set in below it."""
        if self.title:
            yield _folding(Text(shown(self.title, _LONGEST_CELL), style="bold"))
        for row in self.rows:
            first, *others = map(_cell, row)
            if first.plain:
                yield _folding(first)
            for head, cell in zip(self.heads[1:], others, strict=True):
                if cell.plain:
                    yield _folding(Text(f"  {head} " if head else "  ") + cell)


def _cell(text: str | Text) -> Text:
    """A cell's text as it may be shown, with its style."""
    if isinstance(text, Text):
        return text
    return Text(shown(text, _LONGEST_CELL))


def _folding(text: Text) -> Text:
    text.overflow, text.no_wrap = "fold", False
    return text


def markdown(
    heads: Iterable[str], rows: Iterable[Iterable[str]], left: Collection[int] = (0,)
) -> str:
    """Cells below heads as Markdown; those of all columns but the `left` ones stand to the right.

    They stand there as they are: see `markdown_cell`.
    """
    heads = list(heads)
    rule = ["---" if at in left else "---:" for at in range(len(heads))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *rows))


def markdown_cell(text: str) -> str:
    """A text as a cell of a Markdown table: it cannot end the cell, and is no markup or HTML."""
    return _MARKUP.sub(r"\\\1", shown(text)).replace("<", "&lt;")


def csv_text(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Cells below heads as CSV, nothing rounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()
