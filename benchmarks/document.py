"""Tables of the benchmarks, on the screen and, where asked for, in a document."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys; a missing value is an empty cell."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines: list[Iterable[Any]] = [heads, ["---"] * len(heads)]
    lines += [[row.get(head, "") for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(name: str, text: str, place: Path = DOCUMENT) -> None:
    """Put a text between the comments `<!-- name -->` and `<!-- end name -->` of the document."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    document = place.read_text()
    if not re.search(f"{begin}.*{end}", document, re.DOTALL):
        raise SystemExit(f"{place} has no place for {name!r}: {begin} ... {end}")
    before, _, rest = document.partition(begin)
    after = rest.partition(end)[2]
    place.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
