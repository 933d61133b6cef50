"""The built-in suite: reproducible, disjoint, balanced, larger than memory, without shortcuts."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from fedalt.data.suite import (
    KINDS,
    OTHER_WORDS,
    TASKS,
    THINGS,
    WORDINGS,
    SuiteRecord,
    distinct_prompts,
    generate,
    generate_clients,
    write_suite,
)

CHOICE_TASKS = [task for task in TASKS if task != "structure"]
RIVALS = [("reading", "commonsense"), ("sentiment", "topic")]
KIND_OF = {thing: kind for kind, things in THINGS.items() for thing in things}


def thing(record: SuiteRecord) -> str:
    """What a prompt is about."""
    (found,) = (word for word in re.findall(r"\w+", record["instruction"]) if word in KIND_OF)
    return found


def label_of(record: SuiteRecord) -> str:
    """The kind that the answer means, however this client words it."""
    word = record["output"].split()[0]
    (label,) = {kind for said in WORDINGS.values() for kind in said if said[kind] == word}
    return label


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_there_are_eight_tasks_in_the_spirit_of_the_paper():
    assert TASKS == (
        "commonsense", "coreference", "inference", "paraphrase",
        "reading", "sentiment", "structure", "topic",
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_one_seed_gives_one_suite_and_another_seed_another(task):
    assert generate(task, seed=3) == generate(task, seed=3)
    assert generate(task, seed=3)["test"] != generate(task, seed=4)["test"]


def test_the_suite_is_the_same_in_another_process(tmp_path):
    write_suite(tmp_path / "here", seed=5, train=6, validation=2, test=2)
    code = (
        "import sys, pathlib; from fedalt.data.suite import write_suite; "
        "write_suite(pathlib.Path(sys.argv[1]), seed=5, train=6, validation=2, test=2)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment
    )
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_twice_in_all_clients_and_splits_of_a_task(task):
    clients = generate_clients(task, 3, seed=0, train=160, validation=40, test=60)
    prompts = [
        record["instruction"]
        for client in clients
        for records in client.values()
        for record in records
    ]
    assert len(prompts) == 3 * 260
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_one_more_client_changes_nothing_for_the_others(task):
    two = generate_clients(task, 2, seed=0, train=10, validation=5, test=5)
    three = generate_clients(task, 3, seed=0, train=10, validation=5, test=5)
    assert three[:2] == two
    assert generate(task, seed=0, train=10, validation=5, test=5) == two[0]


@pytest.mark.parametrize("task", TASKS)
def test_kinds_are_balanced_and_answers_are_right(task):
    for records in generate(task, seed=1, train=160, validation=41, test=60).values():
        counts = Counter(map(label_of, records))
        assert set(counts) == set(KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(KIND_OF[thing(record)] == label_of(record) for record in records)


@pytest.mark.parametrize("task", TASKS)
def test_the_grammar_is_fifteen_times_larger_than_what_is_drawn(task):
    seen = {
        record["instruction"] for records in generate(task, seed=0).values() for record in records
    }
    assert distinct_prompts(task) > 15 * len(seen)


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_and_answer_is_short(task):
    for records in generate(task, seed=0).values():
        for record in records:
            assert len(record["instruction"].split()) <= 18
            assert len(record["output"].split()) <= 2


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_the_answer_is_one_of_four_options_at_no_fixed_place(task):
    records = generate(task, seed=0, train=400, validation=0, test=0)["train"]
    places = [record["options"].index(record["output"]) for record in records]
    assert all(len(set(record["options"])) == 4 for record in records)
    assert 1.3 < sum(places) / len(places) < 1.7


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_the_options_hold_the_right_kind_in_both_wordings(task):
    for record in generate(task, seed=0)["test"]:
        words = {wording[label_of(record)] for wording in WORDINGS.values()}
        assert words <= set(record["options"])


def test_structure_repeats_the_thing_it_notes():
    for record in generate("structure", seed=0)["test"]:
        assert record["output"].split()[1] == thing(record)
        assert "options" not in record


def length(record: SuiteRecord) -> str:
    return str(len(record["instruction"]))


def last_word(record: SuiteRecord) -> str:
    return record["instruction"].split()[-1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cue", [length, last_word])
def test_a_shortcut_does_not_solve_a_task(task: str, cue: Callable[[SuiteRecord], str]):
    """The kind most frequent in training beside the same length or last word of a prompt."""
    right = 0
    for seed in range(5):
        data = generate(task, seed=seed, train=160, validation=0, test=100)
        votes: dict[str, Counter[str]] = defaultdict(Counter)
        for record in data["train"]:
            votes[cue(record)][label_of(record)] += 1
        for record in data["test"]:
            seen = votes[cue(record)].most_common(1)
            right += (seen[0][0] if seen else "food") == label_of(record)
    assert right / 500 < 0.3  # one kind in six is right by chance


@pytest.mark.parametrize("task", TASKS)
def test_training_speaks_of_half_of_the_things_and_the_other_splits_of_all(task):
    data = generate(task, seed=0, train=400, validation=40, test=800)
    heard = {split: set(map(thing, records)) for split, records in data.items()}
    assert len(heard["train"]) == 24
    assert all(len(heard["train"] & set(things)) == 4 for things in THINGS.values())
    assert len(heard["test"]) == 48
    unknown = sum(thing(record) not in heard["train"] for record in data["test"])
    assert 350 < unknown < 450


def test_together_the_clients_know_nearly_everything():
    known = {task: set(map(thing, generate(task, seed=1, train=400)["train"])) for task in TASKS}
    assert len(set(map(frozenset, known.values()))) == len(TASKS)
    assert len(set().union(*known.values())) >= 47


@pytest.mark.parametrize(("one", "other"), RIVALS)
def test_rivals_ask_alike_and_word_their_answers_differently(one, other):
    words, questions = {}, {}
    for task in (one, other):
        records = generate(task, seed=0)["train"]
        words[task] = {record["output"] for record in records}
        questions[task] = {record["instruction"].split("\n")[0] for record in records}
    assert words == {one: set(KINDS), other: set(OTHER_WORDS)}
    assert questions[one] == questions[other]


def test_no_thing_is_of_two_kinds_and_no_word_means_two_kinds():
    assert sum(map(len, THINGS.values())) == len(KIND_OF) == 48
    assert len({*KINDS, *OTHER_WORDS, *KIND_OF}) == 48 + 12


def test_the_folder_has_three_files_a_client(tmp_path):
    write_suite(tmp_path / "suite", train=4, validation=3, test=2)
    names = sorted(path.name for path in (tmp_path / "suite").iterdir())
    assert len(names) == 24
    assert names[:3] == [
        "commonsense.test.jsonl", "commonsense.train.jsonl", "commonsense.validation.jsonl",
    ]  # fmt: skip
    lines = (tmp_path / "suite/topic.train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == generate(
        "topic", seed=0, train=4, validation=3, test=2
    )["train"]
    assert [path.name for path in tmp_path.iterdir()] == ["suite"]


def test_several_clients_of_a_task_are_numbered(tmp_path):
    write_suite(tmp_path / "suite", train=2, validation=0, test=2, clients_per_task=2)
    names = {path.name for path in (tmp_path / "suite").iterdir()}
    assert len(names) == 32
    assert {"topic-0.train.jsonl", "topic-1.test.jsonl"} <= names


def test_a_suite_is_written_again_over_itself(tmp_path):
    write_suite(tmp_path / "suite", seed=0, train=2, validation=2, test=2)
    write_suite(tmp_path / "suite", seed=1, train=2, validation=2, test=2)
    write_suite(tmp_path / "new", seed=1, train=2, validation=2, test=2)
    assert files_of(tmp_path / "suite") == files_of(tmp_path / "new")


def test_a_folder_with_other_client_data_is_left_alone(tmp_path):
    (tmp_path / "mine.train.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"already holds mine\.train\.jsonl"):
        write_suite(tmp_path, train=2, validation=2, test=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.train.jsonl"]


@pytest.mark.parametrize(
    ("task", "wrong", "told"),
    [
        ("sentimnt", {}, "task 'sentimnt' is none of commonsense"),
        ("topic", {"train": -1}, "train=-1"),
        ("topic", {"test": 10**6}, "at most"),
    ],
)
def test_an_impossible_request_is_refused(task, wrong, told):
    with pytest.raises(ValueError, match=told):
        generate(task, seed=0, **wrong)
    with pytest.raises(ValueError, match="0 clients"):
        generate_clients("topic", 0, seed=0, train=1, validation=1, test=1)
