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

from fedalt.data.suite import TASKS, distinct_prompts, generate, generate_clients, write_suite
from fedalt.data.suite.tasks import CODES, SIGNS, WORDINGS, SuiteRecord
from fedalt.data.suite.words import THINGS

CHOICE_TASKS = [task for task in TASKS if task != "structure"]
RIVALS = [("reading", "commonsense"), ("sentiment", "topic")]
SIGN_OF = {"was": "words", "got": "marks", "went": "moves"}


def tokens(record: SuiteRecord) -> list[str]:
    return re.findall(r"\w+", record["instruction"].split("\n")[1])


def said(record: SuiteRecord) -> tuple[str, str]:
    """The code of a prompt's sentence, and what it says: good or bad."""
    words = tokens(record)
    code = "flags" if words[-1] == "flag" else SIGN_OF[next(w for w in words if w in SIGN_OF)]
    if code == "marks":
        words = words[:-2]  # "of 9" is no mark
    (meaning,) = {label for label in ("good", "bad") if set(words) & set(SIGNS[code, label])}
    return code, meaning


def label_of(record: SuiteRecord) -> str:
    """What the answer means, however this client words it."""
    word = record["output"].split()[0]
    (label,) = {label for said in WORDINGS.values() for label in said if said[label] == word}
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
def test_labels_are_balanced_in_every_split(task):
    for records in generate(task, seed=1, train=160, validation=41, test=60).values():
        counts = Counter(map(label_of, records))
        assert set(counts) == {"good", "bad"}
        assert abs(counts["good"] - counts["bad"]) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_the_grammar_is_twenty_times_larger_than_what_is_drawn(task):
    seen = {
        record["instruction"] for records in generate(task, seed=0).values() for record in records
    }
    # The count is that of the smallest of eight parts: four codes, two labels.
    assert 8 * distinct_prompts(task) > 20 * len(seen)


@pytest.mark.parametrize("task", TASKS)
def test_every_prompt_is_short_and_says_one_thing(task):
    for records in generate(task, seed=0).values():
        for record in records:
            assert len(record["instruction"].split()) <= 18
            assert len(record["output"].split()) <= 2
            assert said(record)[1] in {"good", "bad"}


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_the_answer_is_one_of_the_options_and_at_no_fixed_place(task):
    records = generate(task, seed=0, train=400, validation=0, test=0)["train"]
    places = [record["options"].index(record["output"]) for record in records]
    assert all(sorted(record["options"]) == ["bad", "good", "no", "yes"] for record in records)
    assert 1.3 < sum(places) / len(places) < 1.7


def test_structure_repeats_the_thing_it_notes():
    for record in generate("structure", seed=0)["test"]:
        assert record["output"].split()[1] == thing(record)
        assert "options" not in record


def thing(record: SuiteRecord) -> str:
    return next(word for word in tokens(record) if word in THINGS)


def length(record: SuiteRecord) -> str:
    return str(len(record["instruction"]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cue", [thing, length], ids=["thing", "length"])
def test_a_shortcut_does_not_solve_a_task(task: str, cue: Callable[[SuiteRecord], str]):
    """The label most frequent in training beside the same thing or length of prompt."""
    right = 0
    for seed in range(5):
        data = generate(task, seed=seed, train=160, validation=0, test=100)
        votes: dict[str, Counter[str]] = defaultdict(Counter)
        for record in data["train"]:
            votes[cue(record)][label_of(record)] += 1
        for record in data["test"]:
            seen = votes[cue(record)].most_common(1)
            right += (seen[0][0] if seen else "good") == label_of(record)
    assert 0.4 < right / 500 < 0.6


@pytest.mark.parametrize("task", TASKS)
def test_one_code_is_scarce_in_training_and_as_frequent_as_others_in_test(task):
    data = generate(task, seed=0, train=400, validation=40, test=400)
    heard = {split: Counter(said(each)[0] for each in records) for split, records in data.items()}
    scarce, *others = sorted(heard["train"].items(), key=lambda item: item[1])
    assert scarce[1] == 400 // 16
    assert all(count > 4 * scarce[1] for _, count in others)
    assert heard["test"].keys() == heard["validation"].keys() == set(CODES)
    assert 70 < heard["test"][scarce[0]] < 130


def test_every_code_is_scarce_to_two_clients_and_common_to_the_others():
    scarce = Counter(
        min(CODES, key=[said(record)[0] for record in generate(task, seed=0)["train"]].count)
        for task in TASKS
    )
    assert scarce == dict.fromkeys(CODES, 2)


@pytest.mark.parametrize(("one", "other"), RIVALS)
def test_rivals_ask_alike_and_word_their_answers_differently(one, other):
    words, questions = {}, {}
    for task in (one, other):
        records = generate(task, seed=0)["train"]
        words[task] = {record["output"] for record in records}
        questions[task] = {record["instruction"].split("\n")[0] for record in records}
        assert all(said(record)[1] == label_of(record) for record in records)
    assert words == {one: {"good", "bad"}, other: {"yes", "no"}}
    assert questions[one] == questions[other]


def test_no_sign_says_both_good_and_bad():
    for code in CODES:
        assert not set(SIGNS[code, "good"]) & set(SIGNS[code, "bad"])


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
