"""A run's page: what was run, its table, curves, mixer, similarity, examples, and what it took."""

from statistics import fmean

from fedalt.core.foreign import shown
from fedalt.methods import METHODS
from fedalt.report import figures
from fedalt.report.examples import ends_of, examples
from fedalt.report.parts import Cell, Facts, Figure, Notes, Page, Part, Section, Table
from fedalt.report.records import Record, cost_rows, loss_rows, mixer_record, round_rows
from fedalt.report.similarity import similarity
from fedalt.report.table import Row, best_of, cells_of, describe, heads_of, run_table
from fedalt.report.table import Table as Scores
from fedalt.runs.quarantine import refusals
from fedalt.runs.record import everyone_in, is_federation, summary_in

_MOST_REFUSED = 50
_WITH_THE_CLIENTS = (
    "The mixer's weights, similarity of clients, best and worst examples: they are made of what "
    "stays with the clients. A client's owner sees the own model with `fedalt chat client.toml`."
)
_ABSENT_MIXER = (
    "The mixer's weights: none on record. Either the method has no mixer, or the run was made "
    "before they were written down."
)


def run_page(record: Record) -> Page:
    """All that a run's folder tells; what it has no record of is named at the end."""
    absent: list[str] = []
    table = None if record.split is None else run_table(record.lines, record.split)
    sections = [about(record)]
    if table is None:
        absent.append("Scores: no client has been scored yet.")
    else:
        sections.append(_scores(record, table))
    sections += _curves(record)
    if is_federation(record.facts):
        absent.append(_WITH_THE_CLIENTS)
        sections += _refused(record)
    else:
        sections += _mixer(record, absent)
        sections += _similarity(record, absent)
        sections += examples(record, absent)
    sections += _costs(record)
    if absent:
        sections.append(Section("absent", "Not on this page", [Notes(absent)]))
    name = record.folder.path.resolve().name
    return Page(
        title=f"{record.facts['method']} · {name}",
        over="Federation" if is_federation(record.facts) else "Federated fine-tuning run",
        lead=METHODS.entries[record.facts["method"]].title,
        key=_key(record, table),
        sections=sections,
        foot=f"fedalt {record.facts['versions']['fedalt']} · {record.folder.path}",
    )


def about(record: Record) -> Section:
    """What was run: settings, versions, data, base model, clients."""
    facts, settings = record.facts, record.settings
    data, model = facts["data"], facts["model"]
    general = [
        ("base model", f"{model['name']} ({model['fingerprint']})"),
        ("data", "with the clients" if is_federation(facts) else str(settings["data"]["path"])),
        ("data fingerprint", data["fingerprint"]),
        _trained(record),
        ("seed", str(settings["seed"])),
        ("versions", ", ".join(f"{key} {value}" for key, value in facts["versions"].items())),
    ]
    per_section = [
        (f"[{name}]", ", ".join(f"{key} = {_shown(value)}" for key, value in values.items()))
        for name, values in settings.items()
        if isinstance(values, dict)
    ]
    left = set(facts.get("left", ()))
    splits = ("train", "validation", "test")
    out = {
        **dict.fromkeys(left, " (left)"),
        **dict.fromkeys(facts.get("revoked", ()), " (revoked)"),
    }
    rows = [
        [
            Cell(f"{name}{out.get(name, '')}", name),
            *(Cell.of(counts.get(split)) for split in splits),
        ]
        for name, counts in everyone_in(facts).items()
    ]
    caption = "Clients and their examples"
    if is_federation(facts):
        caption += ", which the server of a federation does not know"
    counted = Table(caption, ["client", *splits], rows)
    return Section("run", "What was run", [Facts([*general, *per_section]), counted])


def _trained(record: Record) -> tuple[str, str]:
    """All numbers that clients of the method trained at any time; before the test of the first fit.

    Local-only training goes on with the numbers of its first fit.
    """
    told = {key: f"{count:,}" for key, count in record.facts["trainable_numbers"].items()}
    label, summary = "trained numbers in the first fit", summary_in(record.lines)
    if summary is not None and (most := summary["effort"].get("trainable_numbers")):
        least = summary["effort"].get("least_numbers", most)
        label = "trained numbers"
        told["own"] = f"{most:,}" if least in (0, most) else f"{least:,}–{most:,}"
    return label, ", ".join(f"{column} {count}" for column, count in told.items())


def score_table(table: Scores, caption: str) -> Table:
    """A run's table with the same numbers as the command prints."""

    def cells(row: Row) -> list[Cell]:
        best = best_of(table, row)
        values = [*row.scores, *([row.gain] if table.baseline else [])]
        numbers = zip(cells_of(table, row), values, strict=True)
        return [
            Cell(row.name, row.name),
            Cell(row.metric, row.metric),
            *(
                Cell(text, fmean(seeds) if seeds else None, at in best)
                for at, (text, seeds) in enumerate(numbers)
            ),
        ]

    heads = ["client", "score", *heads_of(table)]
    feet = [cells(table.mean), cells(table.worst)]
    return Table(caption, heads, [cells(row) for row in table.clients], feet)


def _key(record: Record, table: Scores | None) -> list[tuple[str, str]]:
    clients = len(everyone_in(record.facts))
    numbers = [("clients", str(clients)), ("rounds", str(record.folder.rounds_done()))]
    if table is None:
        return numbers
    for head, text in zip(heads_of(table), cells_of(table, table.mean), strict=True):
        if head == table.columns[0] or head.startswith("gain"):
            numbers.append((f"mean, {head}", text))
    return numbers


def _scores(record: Record, table: Scores) -> Section:
    losses = run_table(record.lines, record.split or "test", losses=True)
    heads = "own is the client's own model, shared the part that all have, local training alone"
    heads += ", base the base model as it is." if "base" in table.columns else "."
    parts: list[Part] = [
        Notes([heads]),
        score_table(table, f"Scores on {record.split} data"),
        Notes(describe(record.lines, record.split or "test"), quiet=True),
        Figure("scores", "Scores of every client", heads, figures.score_dots(table), wide=True),
    ]
    if not table.of_losses:
        caption = "Mean loss of an answer's token, in nats: lower is better"
        parts.insert(2, score_table(losses, caption))
    return Section("scores", "Scores", parts)


def _curves(record: Record) -> list[Section]:
    shown = {part: loss_rows(record, part) for part in ("train", "validation")}
    caption = "Thick: the mean over the clients. Thin: each client; point at one for its name."
    drawn = [
        Figure(
            f"{part}-loss", f"{title} loss", caption, figures.learning_curves(rows, "loss, nats")
        )
        for (part, rows), title in zip(shown.items(), ("Training", "Validation"), strict=True)
        if rows
    ]
    return [Section("curves", "Learning curves", drawn)] if drawn else []


def _mixer(record: Record, absent: list[str]) -> list[Section]:
    mixer = mixer_record(record)
    if mixer is None:
        absent.append(_ABSENT_MIXER)
        return []
    slot, other = ends_of(mixer.slots)
    lead = (
        f"The mixer weighs, token by token and at every site, the {slot} adapter against {other}: "
        f"1 is {slot} alone{', one half is as much of each' if len(mixer.slots) == 2 else ''}."
    )
    after = f"After round {mixer.round}"
    parts: list[Part] = [
        Notes([lead]),
        Figure(
            "mixer-clients", "Over the rounds, by client", "Mean over tokens and sites.",
            figures.mixer_curves(mixer),
        ),
        Figure(
            "mixer-layers", "Over the rounds, by layer",
            "Mean over clients, tokens and a layer's sites.", figures.mixer_layers(mixer),
        ),
        Figure(
            "mixer-sites", f"{after}, by layer and site", "Mean over clients and tokens.",
            figures.mixer_sites(mixer),
        ),
        Figure(
            "mixer-tokens", f"{after}, over tokens",
            "Bars: all clients. Lines: each client.", figures.mixer_tokens(mixer),
        ),
    ]  # fmt: skip
    return [Section("mixer", "The mixer", parts)]


def _similarity(record: Record, absent: list[str]) -> list[Section]:
    similar = similarity(record)
    if isinstance(similar, str):
        absent.append(f"Similarity of clients: {similar}.")
        return []
    whose = "individual" if similar.column == "own" else "local-only"
    what = {"BA": "products B A", "B": "factors B"}[similar.signal]
    lead = (
        f"Cosine of the {what} of two clients' {whose} adapters after round {similar.round}, mean "
        "over the sites. Clients stand in the order of the tree."
    )
    if similar.groups:
        lead += " Groups are those that the method itself has made."
    return [
        Section(
            "similarity",
            "Similarity of clients",
            [
                Notes([lead]),
                Figure(
                    "similarity",
                    "Cosines",
                    "The diagonal is 1.",
                    figures.similarity_map(similar),
                ),
                Figure(
                    "similarity-tree",
                    "Tree",
                    "Average linkage: branches meet at their mean distance, 1 − cosine.",
                    figures.similarity_tree(similar),
                ),
            ],
        )
    ]


def _refused(record: Record) -> list[Section]:
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
        for line in lines[:_MOST_REFUSED]
    ]
    caption = f"Refused uploads: {len(lines)}" + (
        f", the last {_MOST_REFUSED} of them" if len(lines) > _MOST_REFUSED else ""
    )
    table = Table(caption, ["client", "round, from 1", "why"], rows, wide=True)
    return [Section("refused", "Refused uploads", [table])]


def _costs(record: Record) -> list[Section]:
    costs, rounds = cost_rows(record), round_rows(record)
    if not costs or not rounds:
        return []
    client = "Thick: mean over the clients. Thin: each client."
    whole = "All clients one after another, and scoring."
    if is_federation(record.facts):
        whole = "From the calls to the new aggregate: training, transport and waiting."
    drawn = [
        Figure(
            "seconds", "Seconds of training", client,
            figures.client_costs(costs, "seconds", "seconds per client"),
        ),
        Figure(
            "round-seconds", "Seconds of a round", whole,
            figures.round_curve(rounds, "seconds", "seconds per round"),
        ),
        Figure(
            "upload", "Upload", client, figures.client_costs(costs, "upload", "bytes per client")
        ),
        Figure(
            "download", "Download", client,
            figures.client_costs(costs, "download", "bytes per client"),
        ),
        Figure(
            "memory", "Peak memory", "The most that the process has held so far.",
            figures.round_curve(rounds, "memory", "MB"),
        ),
    ]  # fmt: skip
    return [Section("costs", "Time, bytes, memory", drawn)]


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
