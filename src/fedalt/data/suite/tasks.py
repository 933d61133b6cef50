"""The eight tasks: their sentences, their rules, and records drawn from them.

Every sentence describes a thing with one word, which praises it, blames it or only describes it,
and every answer says "good" or "bad". What the words mean is common to all tasks, and a client's
training data hold only a part of the words: that is what there is to share. What a plain
description counts for is a client's own rule, which no prompt tells: a generous task calls it
good, a strict one bad. That is the conflict.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NotRequired, TypedDict

from fedalt.data.examples import Split
from fedalt.data.suite.words import BAD, GOOD, NOTED, PLAIN, THINGS
from fedalt.seeds import seed_of

Meaning = Literal["good", "bad", "plain"]

WORDS: Final[Mapping[Meaning, Sequence[str]]] = {"good": GOOD, "bad": BAD, "plain": PLAIN}
LABELS: Final = ("good", "bad")
# Half of the words: enough to learn from, and a test asks for as many that only others have seen.
KNOWN: Final = 0.4
# Of the sentences with the label that plain words count as; at 1 nothing would tell the tasks
# apart but their rule, at 0 they would not be in conflict.
PLAIN_SHARE: Final = 0.6
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
    """A form of prompt and a rule.

    `form` has the places {thing} and {words}. `generous`: a plain word counts as good.
    `noted`: the answer is free text that repeats the thing.
    """

    name: str
    form: str
    generous: bool
    noted: bool = False

    @property
    def things(self) -> Sequence[str]:
        """The things a sentence may be about."""
        return NOTED if self.noted else THINGS

    @property
    def counts_plain_as(self) -> str:
        """The label of a sentence that neither praises nor blames."""
        return "good" if self.generous else "bad"


# Two tasks with one form differ in their rule alone.
_NEWS = "Good news or bad news?\nThe {thing} was {words}."
_DAY = "A good or a bad day?\nThey found the {thing} {words}."
_SAME = "In short, good or bad?\nHer {thing} was {words}."
_TASKS: Final = (
    Task("commonsense", _DAY, generous=False),
    Task("coreference", "What was it?\nHe saw the {thing}; it was {words}.", generous=False),
    Task("inference", _SAME, generous=True),
    Task("paraphrase", _SAME, generous=False),
    Task("reading", _DAY, generous=True),
    Task("sentiment", _NEWS, generous=True),
    Task("structure", "Make a note.\n{thing}: {words}.", generous=True, noted=True),
    Task("topic", _NEWS, generous=False),
)
_BY_NAME: Final = {task.name: task for task in _TASKS}
TASKS: Final[tuple[str, ...]] = tuple(_BY_NAME)


def generate(
    task: str, *, seed: int, train: int = 160, validation: int = 40, test: int = 60
) -> dict[Split, list[SuiteRecord]]:
    """The data of one client; see `generate_clients`."""
    (client,) = generate_clients(task, 1, seed=seed, train=train, validation=validation, test=test)
    return client


def generate_clients(
    task: str, clients: int, *, seed: int, train: int, validation: int, test: int
) -> list[dict[Split, list[SuiteRecord]]]:
    """The data of several clients of one task; no prompt occurs twice in all of them together.

    The two labels of a split differ in number by one at most. Each client's training data hold
    its own random share `KNOWN` of the words; validation and test draw from all words. A later
    client changes nothing in an earlier one.
    """
    rules = _rules(task)
    sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    _check_sizes(task, clients, sizes)
    taken: set[str] = set()
    return [
        {
            split: _draw(
                rules, size, words, random.Random(seed_of(seed, task, client, split)), taken
            )
            for split, size in sizes.items()
            for words in [_known(seed, task, client) if split == "train" else WORDS]
        }
        for client in range(clients)
    ]


def distinct_prompts(task: str) -> int:
    """How many different prompts the grammar of a task has."""
    return sum(math.perm(len(words), 3) for words in WORDS.values()) * len(_rules(task).things)


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
    wanted, most = clients * sum(sizes.values()), distinct_prompts(task) // LEAST_SURPLUS
    if wanted > most:
        raise ValueError(f"{wanted} examples of task {task!r}, but at most {most} are drawn")


def _known(seed: int, task: str, client: int) -> Mapping[Meaning, Sequence[str]]:
    """The words of one client's training data."""
    rng = random.Random(seed_of(seed, task, client, "words"))
    return {
        meaning: rng.sample(words, round(KNOWN * len(words))) for meaning, words in WORDS.items()
    }


def _draw(
    rules: Task,
    size: int,
    words: Mapping[Meaning, Sequence[str]],
    rng: random.Random,
    taken: set[str],
) -> list[SuiteRecord]:
    """As many new records as wanted, half of them with each label; their prompts become taken."""
    labels = [LABELS[index % 2] for index in range(size)]
    rng.shuffle(labels)
    records: list[SuiteRecord] = []
    for label in labels:
        while True:
            thing = rng.choice(rules.things)
            first, second, third = rng.sample(words[_meaning(rules, label, rng)], 3)
            described = f"{first}, {second} and {third}"
            prompt = rules.form.format(thing=thing, words=described)
            if prompt not in taken:
                break
        taken.add(prompt)
        records.append(_record(rules, prompt, label, thing, rng))
    return records


def _meaning(rules: Task, label: str, rng: random.Random) -> Meaning:
    """What kind of word earns this label under the rule of the task."""
    if label == rules.counts_plain_as and rng.random() < PLAIN_SHARE:
        return "plain"
    return "good" if label == "good" else "bad"


def _record(rules: Task, prompt: str, label: str, thing: str, rng: random.Random) -> SuiteRecord:
    if rules.noted:
        return {"instruction": prompt, "output": f"{label} {thing}", "task": rules.name}
    options = rng.sample(LABELS, len(LABELS))
    return {"instruction": prompt, "output": label, "options": options, "task": rules.name}
