"""The section of a federation's page about uploads that its server did not take."""

from fedalt.core.foreign import shown
from fedalt.report.parts import Cell, Section, Table
from fedalt.report.records import Record
from fedalt.runs.quarantine import refusals

MOST_REFUSED = 50


def refused(record: Record) -> list[Section]:
    """The uploads that a federation's server did not take, the last ones first."""
    lines = refusals(record.folder.path)[::-1]
    if not lines:
        return []
    rows = [
        [
            Cell(line["client"], line["client"]),
            Cell(f"{line['round'] + 1}", line["round"]),
            Cell(shown(line["reason"]), line["reason"]),
        ]
        for line in lines[:MOST_REFUSED]
    ]
    caption = f"Refused uploads: {len(lines)}" + (
        f", the last {MOST_REFUSED} of them" if len(lines) > MOST_REFUSED else ""
    )
    table = Table(caption, ["client", "round, from 1", "why"], rows, wide=True)
    return [Section("refused", "Refused uploads", [table])]
