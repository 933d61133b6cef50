"""`fedalt data check` and `fedalt data split` as a user meets them."""

import json

import pytest
from commands import call
from runs_for_tests import write_clients


@pytest.fixture
def one_file(tmp_path):
    """Forty records with a column and a label."""
    file = tmp_path / "all.jsonl"
    rows = [
        {"text": f"text {n}", "label": ["no", "yes"][n % 2], "who": "xyz"[n % 3]} for n in range(42)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_check_counts_shows_what_is_masked_and_warns(tmp_path, tiny_model_dir, capsys):
    folder = write_clients(tmp_path / "d", "ab")
    (folder / "b.test.jsonl").unlink()
    assert call("data", "check", folder, "--model", tiny_model_dir) == 0
    said = capsys.readouterr()
    for word in (
        "train",
        "test",
        "12",
        "yes: 12",
        "  . ask 0a\n",
        "  > yes</s>\n",
        "> is the answer",
    ):
        assert word in said.out
    assert "b: without test data" in said.err


def test_check_as_json_holds_every_count(tmp_path, tiny_model_dir, capsys):
    folder = write_clients(tmp_path / "d", "ab")
    assert call("data", "check", folder, "--model", tiny_model_dir, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [client["client_id"] for client in report["clients"]] == ["a", "b"]
    assert report["clients"][0]["splits"]["train"]["records"] == 12
    assert report["clients"][1]["splits"]["test"]["balance"] == {"no": 12}


def test_check_reads_no_weights(tmp_path, tiny_model_dir, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model_dir.iterdir():
        if path.suffix == ".json":
            (model / path.name).write_bytes(path.read_bytes())
    folder = write_clients(tmp_path / "d", "a")
    assert call("data", "check", folder, "--model", model) == 0


def test_check_tells_all_problems_at_once(tmp_path, tiny_model_dir, capsys):
    folder = write_clients(tmp_path / "d", "ab")
    (folder / "a.train.jsonl").write_text("{oops\n{}\n")
    (folder / "b.test.jsonl").write_text("[]")
    assert call("data", "check", folder, "--model", tiny_model_dir) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said
    for place in ("a.train.jsonl:1", "a.train.jsonl:2", "b.test.jsonl"):
        assert place in said


@pytest.mark.parametrize(
    ("words", "clients"),
    [
        (["--by", "who"], ["x", "y", "z"]),
        (["--equal", 2], ["client_0", "client_1"]),
        (["--dirichlet", 0.5, "--label", "label", "--clients", 2], ["client_0", "client_1"]),
    ],
)
def test_split_makes_client_folders_that_check_can_read(
    one_file, tmp_path, tiny_model_dir, capsys, words, clients
):
    out = tmp_path / "out"
    assert call("data", "split", one_file, out, *words, "--test-fraction", 0.25, "--seed", 1) == 0
    assert f"{len(clients)} clients in {out}" in capsys.readouterr().err
    assert sorted(path.name for path in out.glob("*.train.jsonl")) == [
        f"{client}.train.jsonl" for client in clients
    ]
    lines = [path.read_text().count("\n") for path in out.glob("*.jsonl")]
    assert sum(lines) == 42


def test_split_as_json_tells_the_counts(one_file, tmp_path, capsys):
    assert call("data", "split", one_file, tmp_path / "o", "--equal", 2, "--json") == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert sum(each["train"] + each["test"] for each in counts.values()) == 42


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "give one of --by, --dirichlet and --equal"),
        (["--by", "who", "--equal", 2], "give one of --by, --dirichlet and --equal"),
        (["--dirichlet", 0.5], "--dirichlet needs --label FIELD and --clients N"),
        (["--by", "whom"], "field 'whom'"),
        (["--equal", 0], "clients=0"),
        (["--equal", 2, "--clients", 3], "--label and --clients say how --dirichlet divides"),
        (["--by", "who", "--label", "who"], "--label and --clients say how --dirichlet divides"),
        (["--equal", 2, "--test-fraction", 1], "test=1.0"),
    ],
)
def test_wrong_words_of_split_make_no_folder(one_file, tmp_path, capsys, words, complaint):
    assert call("data", "split", one_file, tmp_path / "out", *words) == 2
    assert complaint in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_the_built_in_tasks_can_be_written_with_several_clients_each(tmp_path, capsys):
    words = ("--clients", 2, "--train", 4, "--validation", 0, "--test", 2)
    assert call("data", "suite", tmp_path / "suite", *words) == 0
    assert "16 clients in" in capsys.readouterr().err
    assert len(list((tmp_path / "suite").glob("*-1.train.jsonl"))) == 8
    assert call("data", "suite", tmp_path / "suite") == 2  # another suite would mix with it
    assert "already holds" in capsys.readouterr().err
