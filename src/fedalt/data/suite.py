"""The built-in suite: eight small generated tasks, partly related and partly in conflict.

Every question is about a thing, and the answer is what kind of thing it is. A client's training
data speak of half of the things of each kind, a half of its own, and its test data of all of them:
what it cannot know by itself the others know, and that is what there is to share. In which word a
client wants the answer no prompt tells: six say "animal", two say "beast" to the same questions.
That is the conflict.
"""

import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NotRequired, TypedDict

from fedalt.core.seeds import seed_of
from fedalt.data.examples import Split


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Eight things of every kind; no thing is of two kinds.
THINGS: Final[Mapping[str, Sequence[str]]] = {
    "animal": _listed("horse goat rabbit fox mouse sheep camel duck"),
    "food": _listed("bread cheese soup rice cake apple onion butter"),
    "tool": _listed("hammer sickle axe spade rake drill needle knife"),
    "clothes": _listed("coat hat shoe glove scarf shirt dress boot"),
    "vehicle": _listed("ship cart train boat wagon sled coach canoe"),
    "room": _listed("kitchen cellar attic hall library stable parlour bedroom"),
}
KINDS: Final = tuple(THINGS)

# Another word for every kind, in the same order.
OTHER_WORDS: Final = _listed("beast meal device garment carriage chamber")

# Few: what a sentence says besides its thing is noise, and more of it hides more from little data.
NAMES: Final = _listed(
    """Anna Ben Carl Dora Emma Fred Greta Hugo Ida John Kate Louis Mary Nora Otto Paul Rose Sam Tom
    Will"""
)
LOOKS: Final = _listed("big blue clean fine heavy new old plain red small")

# How a client words the kinds.
WORDINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "common": {kind: kind for kind in KINDS},
    "other": dict(zip(KINDS, OTHER_WORDS, strict=True)),
}
# The part of each kind's things that a client's training data speak of.
KNOWN_PART: Final = 2
# A grammar holds at least so many times the prompts that are drawn from it: they are tried until
# one is new.
LEAST_SURPLUS: Final = 2


class SuiteRecord(TypedDict):
    """One record; `options` are absent where the answer is free text."""

    instruction: str
    output: str
    task: str
    options: NotRequired[list[str]]


@dataclass(frozen=True)
class Task:
    """A form of prompt and a wording of the answers.

    `form` has the places {name}, {thing} and {look}; `wording` is one of WORDINGS. `noted`: the
    answer is free text that repeats the thing.
    """

    name: str
    form: str
    wording: str
    noted: bool = False


_IT = "What is it?\n{name} saw the {thing} again, {look} as ever."
_KIND = "Which kind?\nThe {thing} of {name} was {look}."
_WORD = "In one word?\n{name} said the {thing} was {look}."
_SORT = "Sort it.\n{name} found that the {thing} is {look}."
_NOTE = "Make a note.\n{name}'s {thing} was {look}."
_TASKS: Final = (
    Task("commonsense", _IT, wording="other"),
    Task("coreference", _SORT, wording="common"),
    Task("inference", _KIND, wording="common"),
    Task("paraphrase", _KIND, wording="common"),
    Task("reading", _IT, wording="common"),
    Task("sentiment", _WORD, wording="common"),
    Task("structure", _NOTE, wording="common", noted=True),
    Task("topic", _WORD, wording="other"),
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

    Every kind is asked for equally often in a split, up to one, and so is each of the things that
    the split speaks of. A training split speaks of one in
    KNOWN_PART of the things, which differ from client to client, the others of all. A later client
    changes nothing in an earlier one.
    """
    rules = _rules(task)
    sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    _check_sizes(task, clients, sizes)
    taken: set[str] = set()
    return [
        {
            split: _records(
                rules,
                size,
                _known(seed, task, client) if split == "train" else THINGS,
                random.Random(seed_of(seed, task, client, split)),
                taken,
            )
            for split, size in sizes.items()
        }
        for client in range(clients)
    ]


def distinct_prompts(task: str) -> int:
    """How many different prompts there are about the things that a client knows."""
    _rules(task)
    return sum(map(len, THINGS.values())) // KNOWN_PART * len(NAMES) * len(LOOKS)


def write_suite(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 96,
    validation: int = 40,
    test: int = 160,
    clients_per_task: int = 1,
) -> None:
    """Write NAME.train.jsonl, NAME.validation.jsonl and NAME.test.jsonl of every client.

    A client is named after its task, TASK-0, TASK-1 and so on where a task has several. A folder
    that is not there yet appears complete or not at all; in one that is there each file is
    replaced whole.
    """
    files = {
        f"{task}{f'-{client}' if clients_per_task > 1 else ''}.{split}.jsonl": _lines(records)
        for task in TASKS
        for client, splits in enumerate(
            generate_clients(
                task, clients_per_task, seed=seed, train=train, validation=validation, test=test
            )
        )
        for split, records in splits.items()
        if records
    }
    if folder.is_dir():
        others = sorted(path.name for path in folder.glob("*.jsonl") if path.name not in files)
        if others:
            raise ValueError(f"{folder} already holds {others[0]}; expected no other client's data")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        fresh = Path(name) / "suite"
        fresh.mkdir()
        for file, text in files.items():
            (fresh / file).write_text(text, encoding="utf-8")
        if not folder.exists():
            fresh.rename(folder)
        else:
            for file in files:
                (fresh / file).replace(folder / file)


def _known(seed: int, task: str, client: int) -> Mapping[str, Sequence[str]]:
    """The things that a client's training data speak of."""
    rng = random.Random(seed_of(seed, task, client, "known"))
    return {kind: rng.sample(things, len(things) // KNOWN_PART) for kind, things in THINGS.items()}


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


def _records(
    rules: Task,
    size: int,
    things: Mapping[str, Sequence[str]],
    rng: random.Random,
    taken: set[str],
) -> list[SuiteRecord]:
    """As many new records as wanted, each kind and each of its things as often as any other.

    Their prompts become taken.
    """
    order = {kind: rng.sample(of_kind, len(of_kind)) for kind, of_kind in things.items()}
    subjects = []
    for index in range(size):
        turn, place = divmod(index, len(KINDS))
        of_kind = order[KINDS[place]]
        subjects.append((KINDS[place], of_kind[turn % len(of_kind)]))
    rng.shuffle(subjects)
    records: list[SuiteRecord] = []
    for kind, thing in subjects:
        while True:
            prompt = rules.form.format(name=rng.choice(NAMES), thing=thing, look=rng.choice(LOOKS))
            if prompt not in taken:
                break
        taken.add(prompt)
        records.append(_record(rules, prompt, kind, thing, rng))
    return records


def _record(rules: Task, prompt: str, kind: str, thing: str, rng: random.Random) -> SuiteRecord:
    words = WORDINGS[rules.wording]
    answer = words[kind]
    if rules.noted:
        return {"instruction": prompt, "output": f"{answer} {thing}", "task": rules.name}
    wrong = rng.sample([words[other] for other in KINDS if other != kind], 2)
    rival = next(each[kind] for name, each in WORDINGS.items() if name != rules.wording)
    options = [answer, rival, *wrong]
    rng.shuffle(options)
    return {"instruction": prompt, "output": answer, "options": options, "task": rules.name}


def _lines(records: Iterable[SuiteRecord]) -> str:
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
