"""The eight tasks: their sentences, their rules, and records drawn from them.

Every sentence says of a thing that it was good or bad, in one of four codes: words that praise or
blame, a mark, the colour of a flag, or where it went. The codes mean the same to all tasks, and
each client's training data hold hardly any of one of them, of which its test data are full: that
is what there is to share. How an answer is worded is a client's own convention, which no prompt
tells: most say "good" or "bad", two say "yes" or "no" to the same questions. That is the conflict.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NotRequired, TypedDict

from fedalt.data.examples import Split
from fedalt.data.suite.words import BAD, GOOD, NAMES, NOTED, THINGS
from fedalt.seeds import seed_of

Label = Literal["good", "bad"]
Code = Literal["words", "marks", "flags", "moves"]

LABELS: Final[tuple[Label, ...]] = ("good", "bad")
CODES: Final[tuple[Code, ...]] = ("words", "marks", "flags", "moves")
# What fills the place in a code's predicate; of the words two are drawn.
SIGNS: Final[Mapping[tuple[Code, Label], Sequence[str]]] = {
    ("words", "good"): GOOD,
    ("words", "bad"): BAD,
    ("marks", "good"): ("6", "7", "8", "9"),
    ("marks", "bad"): ("1", "2", "3", "4"),
    ("flags", "good"): ("green", "white", "blue", "golden"),
    ("flags", "bad"): ("red", "black", "grey", "brown"),
    ("moves", "good"): ("up", "forward", "ahead", "north"),
    ("moves", "bad"): ("down", "back", "behind", "south"),
}
_PREDICATES: Final[Mapping[Code, str]] = {
    "words": "was {} and {}",
    "marks": "got {} of 9",
    "flags": "got a {} flag",
    "moves": "went {}",
}
# How a client words the two labels; all of these are options of every question.
WORDINGS: Final[Mapping[str, Mapping[Label, str]]] = {
    "value": {"good": "good", "bad": "bad"},
    "verdict": {"good": "yes", "bad": "no"},
}
# So small a part of training data is of the scarce code.
SCARCE_PART: Final = 16
# A grammar holds at least so many times the prompts that are drawn from it.
LEAST_SURPLUS: Final = 20


class SuiteRecord(TypedDict):
    """One record; `options` are absent where the answer is free text."""

    instruction: str
    output: str
    task: str
    options: NotRequired[list[str]]


@dataclass(frozen=True)
class Task:
    """A form of prompt, a wording of the answers, and a gap.

    `form` has the places {name}, {thing} and {said}; `wording` is one of WORDINGS; `scarce` is the
    code that training data hardly hold. `noted`: the answer is free text that repeats the thing.
    """

    name: str
    form: str
    wording: str
    scarce: Code
    noted: bool = False

    @property
    def things(self) -> Sequence[str]:
        """The things a sentence may be about."""
        return NOTED if self.noted else THINGS


# Two tasks with one form differ in their gap alone, or in their wording as well.
_NEWS = "What kind of news?\n{name} said the {thing} {said}."
_DAY = "How was the day?\n{name} found that the {thing} {said}."
_SAME = "In one word?\nThe {thing} of {name} {said}."
_TASKS: Final = (
    Task("commonsense", _DAY, wording="verdict", scarce="flags"),
    Task(
        "coreference",
        "What was it like?\n{name} saw the {thing}; it {said}.",
        wording="value",
        scarce="marks",
    ),
    Task("inference", _SAME, wording="value", scarce="words"),
    Task("paraphrase", _SAME, wording="value", scarce="moves"),
    Task("reading", _DAY, wording="value", scarce="moves"),
    Task("sentiment", _NEWS, wording="value", scarce="marks"),
    Task("structure", "Make a note.\n{name}'s {thing} {said}.", "value", "flags", noted=True),
    Task("topic", _NEWS, wording="verdict", scarce="words"),
)
_BY_NAME: Final = {task.name: task for task in _TASKS}
TASKS: Final[tuple[str, ...]] = tuple(_BY_NAME)


def generate(
    task: str, *, seed: int, train: int = 96, validation: int = 40, test: int = 160
) -> dict[Split, list[SuiteRecord]]:
    """The data of one client; see `generate_clients`."""
    (client,) = generate_clients(task, 1, seed=seed, train=train, validation=validation, test=test)
    return client


def generate_clients(
    task: str, clients: int, *, seed: int, train: int, validation: int, test: int
) -> list[dict[Split, list[SuiteRecord]]]:
    """The data of several clients of one task; no prompt occurs twice in all of them together.

    The two labels of a split differ in number by two at most. Of the task's scarce code are one in
    SCARCE_PART training records and one in four of the others. A later client changes nothing in an
    earlier one.
    """
    rules = _rules(task)
    sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    _check_sizes(task, clients, sizes)
    taken: set[str] = set()
    return [
        {
            split: _records(
                rules, size, split, random.Random(seed_of(seed, task, client, split)), taken
            )
            for split, size in sizes.items()
        }
        for client in range(clients)
    ]


def distinct_prompts(task: str) -> int:
    """How many different prompts the smallest part of a task's grammar has, one code's."""
    return min(len(signs) for signs in SIGNS.values()) * len(_rules(task).things) * len(NAMES)


def _rules(task: str) -> Task:
    if task not in _BY_NAME:
        raise ValueError(f"task {task!r} is none of {', '.join(TASKS)}")
    return _BY_NAME[task]


def _check_sizes(task: str, clients: int, sizes: Mapping[Split, int]) -> None:
    if clients < 1:
        raise ValueError(f"{clients} clients of task {task!r}, but there is at least one")
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"{split}={size} examples of task {task!r}, but there are 0 or more")
    wanted, most = clients * sum(sizes.values()), 8 * distinct_prompts(task) // LEAST_SURPLUS
    if wanted > most:
        raise ValueError(f"{wanted} examples of task {task!r}, but at most {most} are drawn")


def _records(
    rules: Task, size: int, split: Split, rng: random.Random, taken: set[str]
) -> list[SuiteRecord]:
    if split != "train":
        return _draw(rules, size, CODES, rng, taken)
    others = [code for code in CODES if code != rules.scarce]
    few = size // SCARCE_PART
    records = _draw(rules, size - few, others, rng, taken)
    records += _draw(rules, few, [rules.scarce], rng, taken)
    rng.shuffle(records)
    return records


def _draw(
    rules: Task, size: int, codes: Sequence[Code], rng: random.Random, taken: set[str]
) -> list[SuiteRecord]:
    """As many new records as wanted, half of them with each label; their prompts become taken."""
    labels = [LABELS[index % 2] for index in range(size)]
    rng.shuffle(labels)
    records: list[SuiteRecord] = []
    for label in labels:
        while True:
            thing = rng.choice(rules.things)
            said = _said(label, codes, rng)
            prompt = rules.form.format(name=rng.choice(NAMES), thing=thing, said=said)
            if prompt not in taken:
                break
        taken.add(prompt)
        records.append(_record(rules, prompt, label, thing, rng))
    return records


def _said(label: Label, codes: Sequence[Code], rng: random.Random) -> str:
    """A predicate with this meaning."""
    code = rng.choice(codes)
    return _PREDICATES[code].format(*rng.sample(SIGNS[code, label], 2))


def _record(rules: Task, prompt: str, label: Label, thing: str, rng: random.Random) -> SuiteRecord:
    answer = WORDINGS[rules.wording][label]
    if rules.noted:
        return {"instruction": prompt, "output": f"{answer} {thing}", "task": rules.name}
    options = [word for wording in WORDINGS.values() for word in wording.values()]
    rng.shuffle(options)
    return {"instruction": prompt, "output": answer, "options": options, "task": rules.name}
