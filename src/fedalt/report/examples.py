"""The test examples of a run's page: each client's worst and best, coloured by the mixer."""

from collections.abc import Sequence

from fedalt.report.parts import Example, Examples, Notes, Section, Token
from fedalt.report.records import Line, Record
from fedalt.runs.folder import EXAMPLES

MOST_LETTERS = 700  # of a prompt, a reference, a prediction
MOST_TOKENS = 160  # of a prompt whose tokens are coloured
MANY_CLIENTS = 16  # beyond which one best and one worst example of each are shown

_ABSENT_EXAMPLES = (
    f"Best and worst examples: the run has no {EXAMPLES}. It was not tested, or made before that "
    "file was written."
)


def examples(record: Record, absent: list[str]) -> list[Section]:
    """The section of examples; without any, none, and a sentence that says why."""
    if not record.examples:
        absent.append(_ABSENT_EXAMPLES)
        return []
    by_client: dict[str, list[Line]] = {}
    for line in record.examples:
        by_client.setdefault(line["client"], []).append(line)
    most = 3 if len(by_client) <= MANY_CLIENTS else 1
    clients = [(name, _extremes(lines, most)) for name, lines in sorted(by_client.items())]
    slots = next((line["slots"] for line in record.examples if line.get("tokens")), None)
    lead = f"Up to {most} test examples of each client with the highest and the lowest loss."
    ends = None if slots is None else ends_of(slots)
    return [Section("examples", "Examples", [Notes([lead]), Examples(clients, ends)])]


def ends_of(slots: Sequence[str]) -> tuple[str, str]:
    """What a weight of 1 and one of 0 stand for: the first slot, and the other one or others."""
    first, *others = (name.replace("_", " ") for name in slots)
    return first, others[0] if len(others) == 1 else "all others"


def _extremes(lines: Sequence[Line], most: int) -> list[Example]:
    """The worst, highest loss first, then the best, lowest first; none twice."""
    ranked = sorted(lines, key=lambda line: -line["loss"])
    worst = ranked[: min(most, (len(ranked) + 1) // 2)]
    best = ranked[len(worst) :][::-1][:most]
    return [
        *(_example(line, f"worst {rank}") for rank, line in enumerate(worst, 1)),
        *(_example(line, f"best {rank}") for rank, line in enumerate(best, 1)),
    ]


def _example(line: Line, rank: str) -> Example:
    tokens = line.get("tokens") or []
    return Example(
        rank=rank,
        loss=line["loss"],
        prompt=_clipped(line["prompt"]),
        reference=_clipped(line["reference"]),
        prediction=None if line["prediction"] is None else _clipped(line["prediction"]),
        tokens=[Token(text, weight) for text, weight in tokens[-MOST_TOKENS:]],
        cut=len(tokens) > MOST_TOKENS,
    )


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} …"
