"""The data doctor's findings as a page: lengths, balance, repetitions and leaks, an example."""

import altair as alt

from fedalt.core.foreign import shown
from fedalt.data.data_report import ClientReport, DataReport
from fedalt.report.parts import Cell, Facts, Figure, Masked, Notes, Page, Section, Table
from fedalt.report.records import Rows, short
from fedalt.report.style import (
    ACCENT,
    INK,
    SECOND,
    data_of,
    heat_map,
    names_axis,
    rows_high,
    styled,
)

_SPLITS = {"train": ACCENT, "validation": "#8a8f98", "test": SECOND}
MOST_NAMES = 24  # of labels or answers in one chart


def data_page(report: DataReport, model: str) -> Page:
    """All findings; `model` is whose tokenizer they were made with."""
    splits = [split for client in report.clients for split in client.splits.values()]
    warnings = report.warnings or ("Nothing to warn of.",)
    balance = _balances(report)
    sections = [
        Section("warnings", "Findings", [Notes(warnings)]),
        Section(
            "records",
            "Records and lengths",
            [
                _records(report),
                Figure(
                    "lengths", "Tokens of an example",
                    f"From the median to the longest; the bar marks 95 %, the line "
                    f"max_length = {report.max_length}.",
                    lengths(report), wide=True,
                ),
            ],
        ),
        Section("leaks", "Repetitions and leaks", [_leaks(report)]),
        *([Section("balance", "Balance", balance)] if balance else []),
        Section(
            "example",
            "What the loss is on",
            [Masked(f"The first train example of {report.example_client}", *report.example)],
        ),
        Section("about", "About", [Facts(_about(report, model))]),
    ]  # fmt: skip
    return Page(
        title=report.path,
        over="Client data",
        lead=f"As the tokenizer of {model} sees it.",
        key=[
            ("clients", str(len(report.clients))),
            ("records", f"{sum(split.records for split in splits):,}"),
            ("warnings", str(len(report.warnings))),
        ],
        sections=sections,
    )


def lengths(report: DataReport) -> alt.LayerChart:
    """Tokens per example by client and split: median, 95 % and longest."""
    rows: Rows = [
        {
            "client": client.client_id,
            "split": name,
            "median": split.tokens.p50,
            "p95": split.tokens.p95,
            "longest": split.tokens.longest,
            "limit": report.max_length,
        }
        for client in report.clients
        for name, split in client.splits.items()
    ]
    splits = [name for name in _SPLITS if any(row["split"] == name for row in rows)]
    colours = alt.Scale(domain=splits, range=[_SPLITS[name] for name in splits])
    data = data_of(rows)
    base = alt.Chart(data).encode(
        y=alt.Y("client:N", title=None, sort=None),
        yOffset=alt.YOffset("split:N", sort=splits),
        color=alt.Color("split:N", scale=colours, legend=alt.Legend(title=None)),
        tooltip=["client:N", "split:N", "median:Q", "p95:Q", "longest:Q"],
    )
    span = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("median:Q", title="tokens, prompt and answer", scale=alt.Scale(zero=False)),
        x2="longest:Q",
    )
    tick = base.mark_tick(thickness=3, height=8).encode(x="p95:Q")
    limit = alt.Chart(data).mark_rule(stroke=INK, strokeDash=[4, 3]).encode(x="mean(limit):Q")
    # Far above the texts, a line would leave the rest of the chart no room.
    near = max(row["longest"] for row in rows) * 3 > report.max_length
    drawn = [span, tick, *([limit] if near else [])]
    return styled(alt.layer(*drawn, data=data), rows_high(len(report.clients)))


def balances(rows: Rows, title: str) -> alt.LayerChart:
    """The share of every label, answer or position in a client's train data."""
    names = sorted({row["name"] for row in rows})
    clients = list(dict.fromkeys(row["client"] for row in rows))
    return heat_map(
        rows,
        (
            alt.X("name:N", sort=names, axis=names_axis(names)),
            alt.Y("client:N", sort=clients, title=None),
        ),
        alt.Tooltip("train:Q", title="train", format=".1%"),
        alt.Scale(scheme="viridis", domainMin=0),
        legend=title,
        also=[alt.Tooltip("test:Q", format=".1%")],
    )


def _records(report: DataReport) -> Table:
    heads = [
        "client", "split", "records", "tokens, mean", "median", "95 %", "longest", "answers",
        "cut", "answers cut", "empty", "unknown",
    ]  # fmt: skip
    rows = [
        [
            Cell(client.client_id, client.client_id),
            Cell(name, name),
            Cell.of(split.records),
            Cell(f"{split.tokens.mean:.0f}", split.tokens.mean),
            *(Cell.of(n) for n in (split.tokens.p50, split.tokens.p95, split.tokens.longest)),
            Cell(f"{split.answer_share:.0%}", split.answer_share),
            Cell.of(split.truncated_prompts),
            Cell.of(split.answers_too_long),
            Cell.of(split.empty_answers),
            Cell(f"{split.unknown_share:.1%}", split.unknown_share),
        ]
        for client in report.clients
        for name, split in client.splits.items()
    ]
    return Table("Records and tokens; answers: the share of tokens with loss", heads, rows)


def _leaks(report: DataReport) -> Table:
    heads = [
        "client", "repeated in train", "test in train", "questions in train", "test elsewhere",
        "most of all in", "distance", "sorted",
    ]  # fmt: skip
    rows = [[Cell(client.client_id, client.client_id), *_leak(client)] for client in report.clients]
    caption = "Records that occur twice; distance: of the balance in train from that in test"
    return Table(caption, heads, rows)


def _leak(client: ClientReport) -> list[Cell]:
    where = client.elsewhere_client or "–"
    sorted_ = [name for name, split in client.splits.items() if split.looks_sorted]
    said = ", ".join(sorted_) or "–"
    return [
        Cell.of(client.splits["train"].duplicates),
        *(Cell.of(n) for n in (client.overlap, client.question_overlap, client.elsewhere)),
        Cell(where, where),
        Cell("–" if client.distance is None else f"{client.distance:.2f}", client.distance),
        Cell(said, said),
    ]


def _balances(report: DataReport) -> list[Figure]:
    """A chart for every thing that is counted: labels, answers, positions of the right option."""
    drawn = []
    for kind in ("label", "answer", "position"):
        rows = [
            {
                "client": client.client_id,
                "name": shown(name),
                "train": short(count / client.splits["train"].records),
                "test": short(_share(client, name)),
            }
            for client in report.clients
            if client.balance_of == kind
            for name, count in client.splits["train"].balance.items()
        ]
        if rows and len({row["name"] for row in rows}) <= MOST_NAMES:
            title = "position of the right option" if kind == "position" else kind
            caption = f"The share of every {title} in train; point at a cell for that in test."
            drawn.append(
                Figure(f"balance-{kind}", title.capitalize(), caption, balances(rows, "share"))
            )
    return drawn


def _share(client: ClientReport, name: str) -> float:
    test = client.splits.get("test")
    return 0.0 if test is None else test.balance.get(name, 0) / test.records


def _about(report: DataReport, model: str) -> list[tuple[str, str]]:
    return [
        ("folder", report.path),
        ("kind", report.kind),
        *([("labels", ", ".join(report.labels))] if report.labels else []),
        ("fingerprint", report.fingerprint),
        ("tokenizer", model),
        ("max_length", str(report.max_length)),
        *([("ignored files", ", ".join(report.ignored))] if report.ignored else []),
    ]
