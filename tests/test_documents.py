"""The documents keep their word: commands in them run, files they name are there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import call

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ANSWERS = {"anna": ("yes", "no"), "ben": ("good", "bad"), "cleo": ("true", "false")}


def commands_of(text: str) -> list[list[str]]:
    """The words of every `fedalt` command in fenced blocks and in tables."""
    found = re.findall(r"^(?:\| `)?(fedalt [^`\n]*)", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in found]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder as the documents assume it: two clients, a newcomer, one file of all."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("newcomers").mkdir()
    whole = []
    for client, answers in ANSWERS.items():
        for split, first, count in (("train", 0, 20), ("test", 100, 4)):
            records = [
                {"instruction": f"Is {n} even?", "output": answers[n % 2]}
                for n in range(first, first + count)
            ]
            lines = "".join(json.dumps(record) + "\n" for record in records)
            folder = "newcomers" if client == "cleo" else "data"
            Path(f"{folder}/{client}.{split}.jsonl").write_text(lines)
            columns = {"department": client}
            whole += [{**each, **columns, "category": each["output"]} for each in records]
    Path("all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in whole))
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(here, capsys):
    commands = commands_of((ROOT / "README.md").read_text())
    assert len(commands) >= 7
    for words in commands:
        words = ["tiny" if word == "MODEL" else word for word in words]
        if words[0] == "run":
            words = [*words, "--max-new-tokens", "4", "--evaluate-every", "10"]
        assert call(*words) == 0, capsys.readouterr().err
    assert (here / "anna-model" / "adapter_config.json").exists()


@pytest.mark.slow
def test_the_comparison_of_the_documents_runs(here, capsys):
    text = (ROOT / "docs" / "comparing.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    # One seed and short answers: what is tried here is the file and the commands.
    block = block.replace("[0, 1, 2]", "[0]").replace(
        "rounds = 3", "rounds = 1\n[scoring]\ngenerate = false"
    )
    Path("methods.toml").write_text(block)
    commands = commands_of(text)
    assert [words[0] for words in commands] == ["compare", "tune", "compare"]
    shorter = {"1e-3,2e-3,4e-3": "2e-3", "4,8": "4", "2": "1"}
    for words in commands:
        words = [shorter.get(word, word) for word in words]
        assert call(*words) == 0, capsys.readouterr().err
    assert "FedDPA, long tail" in Path("runs/tuned/table.md").read_text()


@pytest.mark.slow
def test_what_watching_says_runs(here, capsys):
    text = (ROOT / "docs" / "watching.md").read_text()
    for words in commands_of(text):
        words = [*words, "--max-new-tokens", "4"] if words[0] == "run" else words
        assert call(*words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("4 of 4 rounds done") == 2
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})  # the document's own lines
    assert (here / "anna-model" / "adapter_config.json").exists()


def test_every_way_to_split_a_file_runs(here, capsys):
    commands = commands_of((ROOT / "docs" / "data.md").read_text())
    assert len(commands) == 3
    for number, words in enumerate(commands):
        words = [f"clients-{number}" if word == "clients" else word for word in words]
        # Ten clients of 72 records may lack some: what is tried here is the command.
        words = ["2" if word in ("8", "10") else word for word in words]
        assert call(*words) == 0, capsys.readouterr().err
        assert (here / f"clients-{number}" / "split.json").exists()


def test_the_settings_file_of_the_documents_is_one(here):
    from fedalt.settings import read_settings

    text = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    Path("config.toml").write_text(block)
    assert read_settings(Path("config.toml")).rounds.rounds == 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_source_and_test_files_exist(document):
    text = document.read_text()
    for path in re.findall(r"`(tests/\w+\.py|benchmarks/\w+\.py|scripts/\w+\.py)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:methods|adapters|engine|training|data)/\w+\.py)`", text):
        assert (ROOT / "src" / "fedalt" / path).exists(), path
