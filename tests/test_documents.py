"""The documents keep their word: commands in them run, files they name are there."""

import ast
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer.main
from commands import call
from serving import serving

from fedalt.cli import app
from fedalt.methods import METHODS
from fedalt.runs.compare import read_comparison

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
ANSWERS = {"anna": ("yes", "no"), "ben": ("good", "bad"), "cleo": ("true", "false")}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

# Commands of a federation wait for each other: tests/test_flower.py runs them as processes.
TOGETHER = ("server", "client")
ENDLESS = ("serve",)


def blocks_of(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, and, without one, what is indented like code too."""
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    found = [block for name, block in fences if name == language]
    if not language:
        found += re.findall(r"^ {4,}((?:fedalt|make|pip|python) (?:.*\\\n)*.*)", text, re.MULTILINE)
    return found


def shell_of(text: str) -> list[list[str]]:
    """The words of every line that is meant for a shell, in blocks and at the start of a row."""
    rows = re.findall(r"^\| `(fedalt [^`]*)`", text, re.MULTILINE)
    lines = [
        line.strip()
        for block in (*blocks_of(text), *blocks_of(text, "sh"), *rows)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    starts = ("fedalt ", "make ", "pip ", "python ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]


def commands_of(text: str) -> list[list[str]]:
    """The words of every `fedalt` command that is there to be typed."""
    return [words[1:] for words in shell_of(text) if words[0] == "fedalt"]


def mentions_of(text: str) -> list[list[str]]:
    """The words of what is said in passing, such as the name of a command and an option."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"(?<!`)`(fedalt [^`]*?)`(?!`)", text)
    return [shlex.split(each.replace("\n", " "), comments=True)[1:] for each in found]


def parse(words: list[str]) -> None:
    """Parse a command as `fedalt` would, without running it. Raises click's errors."""
    command: click.Command = typer.main.get_command(app)
    context, name = None, "fedalt"
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not isinstance(command, click.Group):
            return
        found, below, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None
        assert below is not None
        name, command = found, below


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


@each_document
def test_every_command_is_one_that_fedalt_takes(document):
    text = document.read_text()
    wrong = []
    for words in commands_of(text):
        try:
            parse(["1" if word == "LR" else word for word in words])
        except click.exceptions.Exit:
            pass  # its help
        except click.ClickException as error:
            wrong.append((shlex.join(words), error.format_message()))
    for words in mentions_of(text):
        try:
            parse(words)
        except (click.MissingParameter, click.exceptions.NoArgsIsHelpError, click.exceptions.Exit):
            pass  # the name of a command, or its help
        except click.ClickException as error:
            wrong.append((shlex.join(words), error.format_message()))
    assert wrong == []


@pytest.mark.parametrize(
    "words", ["runn", "run --roundz 3", "data chekc data", "report", "run --rounds many"]
)
def test_a_command_that_fedalt_does_not_take_is_found(words):
    with pytest.raises(click.ClickException):
        parse(words.split())


@each_document
def test_targets_extras_and_scripts_are_there(document):
    text = document.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shell = shell_of(text)
    made = [words[1] for words in shell if words[0] == "make"]
    made += re.findall(r"`make ([a-z-]+)`", text)
    assert set(made) <= targets
    extras = re.findall(r"fedalt\[([a-z-]+)\]", text)
    assert set(extras) <= project["optional-dependencies"].keys()
    for words in shell:
        if words[0] == "python" and words[1] != "-c":
            script = ROOT / words[1]
            assert script.exists(), words
            flags = [word for word in words if word.startswith("--")]
            assert all(f'"{flag}"' in script.read_text() for flag in flags), words


@each_document
def test_settings_and_python_in_blocks_can_be_read(document):
    text = document.read_text()
    for block in blocks_of(text, "toml"):
        tomllib.loads(re.sub(r"^ {4}", "", block, flags=re.MULTILINE))
    for block in blocks_of(text, "python"):
        ast.parse(block)


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(here, capsys, monkeypatch):
    commands = commands_of((ROOT / "README.md").read_text())
    elsewhere = commands_of((DOCS / "comparing.md").read_text())
    apart = (*TOGETHER, *ENDLESS)
    story = [words for words in commands if words not in elsewhere and words[0] not in apart]
    assert len(story) == len(commands) - 4
    assert {words[0] for words in story} >= {
        *("data", "run", "resume", "evaluate", "generate", "export", "join", "leave"),
        *("watch", "report", "chat", "track", "federation"),
    }
    for words in story:
        words = ["tiny" if word == "MODEL" else word for word in words]
        if words[0] == "run":
            few = ("--rounds", "3", "--max-new-tokens", "4", "--evaluate-every", "3")
            words = [*words, *few]
        monkeypatch.setattr(sys, "stdin", io.StringIO("Is 7 even?\n"))
        assert call(*words) == 0, (words, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "3 of 3 rounds done" in said
    assert "has not begun" in said
    assert (here / "anna-model" / "adapter_config.json").exists()
    assert "<html" in (here / "runs" / "mine" / "report.html").read_text()
    assert list((here / "runs" / "mine" / "tensorboard").iterdir())
    assert {path.name for path in (here / "clinics" / "clients").iterdir()} == {
        *("berlin", "oslo", "turin")
    }
    for words in commands:
        if words[0] in TOGETHER:
            assert (here / words[words.index("--config") + 1]).exists()
    (block,) = blocks_of((ROOT / "README.md").read_text(), "python")
    exec(block, {})  # the document's own lines


@pytest.mark.slow
def test_three_csv_files_become_three_models_that_the_openai_client_asks(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("openai", reason="`pip install openai` has not been called")
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for client, words in ANSWERS.items():
        for split, count in (("train", 12), ("test", 2)):
            rows = [f'"Is {n} even, please?",{words[n % 2]}' for n in range(count)]
            table = "\n".join(["instruction,output", *rows])
            Path(f"data/{client}.{split}.csv").write_text(f"{table}\n")
    commands = commands_of((ROOT / "README.md").read_text())
    (check,) = [words for words in commands if words[:3] == ["data", "check", "data"]]
    (run,) = [words for words in commands if words[0] == "run" and "MODEL" not in words]
    (serve,) = [words for words in commands if words[0] == "serve"]
    few = ("--rounds", "1", "--max-new-tokens", "4", "--no-local-baseline")
    assert call(*check) == 0, capsys.readouterr().err
    assert call(*run, *few) == 0, capsys.readouterr().err
    Path("runs/first").rename(serve[1])  # the README serves the run of the user's own model
    with serving(Path(serve[1]), *serve[2:]) as server:
        client = server.client()
        names = {model.id for model in client.models.list()} - {"base"}
        assert names == ANSWERS.keys()
        for name in names:
            asked = [{"role": "user", "content": "Is 7 even, please?"}]
            said = client.chat.completions.create(model=name, messages=asked, max_tokens=3)
            assert said.choices[0].finish_reason in ("stop", "length")
            assert said.usage.completion_tokens > 0


@pytest.mark.slow
@pytest.mark.long
def test_the_comparison_of_the_documents_runs(here, capsys):
    text = (DOCS / "comparing.md").read_text()
    block, searching = blocks_of(text, "toml")
    Path("searching.toml").write_text(searching)
    read_comparison(Path("searching.toml"))
    # One seed, one round, losses alone: what is tried here is the file and the commands.
    block = block.replace("[0, 1, 2]", "[0]").replace(
        "rounds = 10", "rounds = 1\n[scoring]\ngenerate = false"
    )
    Path("methods.toml").write_text(block)
    entries, _ = read_comparison(Path("methods.toml"))
    assert len(entries) == 4
    common, _, *some, _ = block.split("[[methods]]")  # without the first and the last
    Path("methods.toml").write_text("[[methods]]".join([common, *some]))
    commands = commands_of(text)
    assert [words[0] for words in commands] == [*["compare"] * 3, "tune", "compare"]
    shorter = {"1e-3,2e-3,4e-3": "1e-3,2e-3", "4,8": "4", "2": "1"}
    for words in commands:
        words = [shorter.get(word, word) for word in words]
        assert call(*words) == 0, capsys.readouterr().err
    assert "FedDPA, long tail" in Path("runs/tuned/table.md").read_text()
    reports = commands_of((DOCS / "reports.md").read_text())
    (of_comparison,) = [words for words in reports if words[1] == "runs/comparison"]
    assert call(*of_comparison) == 0, capsys.readouterr().err
    assert "<html" in Path("runs/comparison/report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_serving_says_runs(here, capsys):
    text = (DOCS / "serving.md").read_text()
    (python,) = blocks_of(text, "python")
    shell = [block for block in blocks_of(text) if block.startswith("curl")]
    curls = [line for block in shell for line in block.replace("\\\n", "").splitlines()]
    for words in commands_of(text):
        if words[0] == "run":
            words = [*words, "--rounds", "1", "--max-new-tokens", "4", "--no-local-baseline"]
        if words[0] != "serve":
            assert call(*words) == 0, capsys.readouterr().err
        elif "--token-file" in words:
            Path("token").write_text("secret\n")
            with serving(Path(words[1]), *words[2:]) as server:
                assert len(list(server.client("secret").models.list())) == 3
        elif not words[1].startswith("clinics"):
            with serving(Path(words[1])) as server:
                local = "http://127.0.0.1:8000"
                exec(python.replace(local, server.url), {})  # the document's own lines
                for line in curls:
                    said = subprocess.check_output(shlex.split(line.replace(local, server.url)))
                    assert "error" not in json.loads(said)
                assert server.end() == 0
    answers = capsys.readouterr().out.splitlines()
    for words in commands_of((DOCS / "export.md").read_text()):
        if words[0] == "evaluate":  # the harness's own data are on the hub: tests/test_harness.py
            continue
        assert call(*words) == 0, capsys.readouterr().err
    assert (here / "loras" / "ben" / "adapter_config.json").exists()
    assert (here / "anna-merged" / "model.safetensors").exists()
    assert len(curls) == 2
    assert (here / "exports" / "ben").is_dir()
    assert answers[-1] == answers[-4]  # the run's and the exports' answers


@pytest.mark.slow
def test_what_watching_and_reports_say_runs(here, capsys):
    text = (DOCS / "watching.md").read_text()
    for words in commands_of(text):
        words = [*words, "--max-new-tokens", "4"] if words[0] == "run" else words
        assert call(*words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("4 of 4 rounds done") == 2
    (block,) = blocks_of(text, "python")
    exec(block, {})  # the document's own lines
    assert (here / "anna-model" / "adapter_config.json").exists()
    Path("runs/fedalt").symlink_to("mine")
    for words in commands_of((DOCS / "reports.md").read_text()):
        if words[1] != "runs/comparison":
            assert call(*words) == 0, capsys.readouterr().err
    assert "<html" in (here / "data.html").read_text()
    assert list((here / "figures").glob("*.svg"))


def test_every_way_to_split_a_file_runs(here, capsys):
    commands = commands_of((DOCS / "data.md").read_text())
    commands = [words for words in commands if words[:2] == ["data", "split"]]
    assert len(commands) == 3
    for number, words in enumerate(commands):
        words = [f"clients-{number}" if word == "clients" else word for word in words]
        # Ten clients of 72 records may lack some: what is tried here is the command.
        words = ["2" if word in ("8", "10") else word for word in words]
        assert call(*words) == 0, capsys.readouterr().err
        assert (here / f"clients-{number}" / "split.json").exists()


def test_a_table_with_columns_of_its_own_trains(here, capsys):
    rows = [f'{site},"what is {n}, please?",it is {n}' for site in ("it", "hr") for n in range(6)]
    table = "\n".join(["department,question,answer", *rows])
    (here / "tickets.csv").write_text(f"{table}\n")
    commands = commands_of((DOCS / "data.md").read_text())
    (words,) = [words for words in commands if words[0] == "run"]
    assert call(*words, "--rounds", "1", "--rank", "2", "--out", "tickets") == 0, (
        capsys.readouterr()
    )
    assert "2 clients" in capsys.readouterr().err


def test_the_settings_file_of_the_documents_is_one(here):
    from fedalt.runs.settings import read_settings

    (block,) = blocks_of((DOCS / "data.md").read_text(), "toml")
    Path("config.toml").write_text(block)
    assert read_settings(Path("config.toml")).rounds.rounds == 20


def test_the_table_of_methods_has_all_of_them_and_figures_that_were_measured():
    readme = (ROOT / "README.md").read_text()
    part = readme[readme.index("## Which method when") : readme.index("## What it does not do yet")]
    assert set(re.findall(r"`([a-z0-9_]+)`", part)) >= METHODS.keys()
    rows = "\n".join(line for line in part.splitlines() if line.startswith("|"))
    figures = set(re.findall(r"\d+\.\d+", rows))
    assert len(figures) > 10
    assert figures <= set(re.findall(r"\d+\.\d+", (DOCS / "results.md").read_text()))


@cache
def sentences() -> tuple[str, ...]:
    """Every text in the package's source, with … for what is put in."""
    found: list[str] = []
    for file in (ROOT / "src" / "fedalt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Constant(value=str(text)):
                    found.append(text)
                case ast.JoinedStr(values=values):
                    parts = [
                        part.value if isinstance(part, ast.Constant) else "…" for part in values
                    ]
                    found.append("".join(map(str, parts)))
    return tuple(found)


def test_the_errors_that_troubleshooting_names_are_those_of_the_package():
    titles = re.findall(
        r"^### (`+) ?(.*?) ?\1$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(titles) > 25
    for _, title in titles:
        pieces = [re.escape(piece) for piece in title.split("…")]
        assert any(re.search(".*".join(pieces), each) for each in sentences()), title
        assert max(map(len, pieces)) > 8, title


def heads_of(document: Path) -> set[str]:
    """The anchors of a document, named as forges name them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links_of(document: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link that stays in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            path, _, anchor = target.partition("#")
            yield path, anchor


@each_document
def test_links_and_their_anchors_lead_somewhere(document):
    for path, anchor in links_of(document):
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in heads_of(target), (path, anchor)


def test_every_document_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop().resolve()
        if document not in reached and document.suffix == ".md":
            reached.add(document)
            todo += [document.parent / path for path, _ in links_of(document) if path]
    assert {document for document in DOCUMENTS if document.resolve() not in reached} == set()


@each_document
def test_named_source_and_test_files_exist(document):
    text = document.read_text()
    for path in re.findall(r"`(tests/\w+\.py|benchmarks/\w+\.py|scripts/\w+\.py)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:methods|adapters|engine|training|data)/\w+\.py)`", text):
        assert (ROOT / "src" / "fedalt" / path).exists(), path


def test_make_bench_takes_every_table_of_the_benchmarks():
    """All but the one that needs a GPU, by the commands that stand above them."""
    page, makefile = ((ROOT / name).read_text() for name in ("docs/benchmarks.md", "Makefile"))
    lines = re.findall(r"^    python (benchmarks/[^#\n]*--write[^#\n]*)", page, re.MULTILINE)
    shown = {line.strip() for line in lines} - {"benchmarks/gpu.py --write"}
    assert len(shown) == len(re.findall(r"<!-- end ", page)) - 1
    bench = makefile.partition("\nbench:")[2].partition("\n\n")[0]
    lines = re.findall(r"\$\(BIN\)/python (benchmarks/[^\\\n]*)", bench)
    assert {line.strip() for line in lines} == shown | {"benchmarks/serving.py --write"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path):
    words = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    for name in ("fedalt.run", "fedalt.methods.contract.Method", "fedalt.runs.settings.Settings"):
        assert f'id="{name}"' in page
    for file in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"(https?:[^\"]*)", file.read_text()
        )
        assert loaded == [], file
