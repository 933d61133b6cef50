"""Runs from Python: the numbers are those of the command line, and importing stays light."""

import json
import re
import subprocess
import sys

import pytest
from commands import call

import fedalt
from fedalt.runs.folder import open_run


def settings(model, data, **sections):
    """A nested dict as `fedalt.run` takes it, of a run that takes seconds."""
    return {
        "data": {"path": data, "max_length": 60, "validation": 0.2},
        "model": {"name": model, "device": "cpu"},
        "method": {"name": "fedalt", "rank": 2},
        "training": {"batch_size": 4},
        "rounds": {"rounds": 2},
        "scoring": {"max_new_tokens": 3},
        **sections,
    }


@pytest.fixture(scope="module")
def run(tiny_model_dir, clients_dir, tmp_path_factory):
    """A run from Python, to be left as it is."""
    return fedalt.run(
        settings(tiny_model_dir, clients_dir), out=tmp_path_factory.mktemp("api") / "run"
    )


def test_a_table_holds_the_numbers_that_the_command_prints(run, capsys):
    assert call("resume", run.path, "--json") == 0
    told = json.loads(capsys.readouterr().out)["scores"]
    table = run.table()
    assert list(table.index) == ["a", "b", "c", "mean", "worst client"]
    assert list(table.columns) == ["score", "own", "shared", "local", "base", "gain over local"]
    for client, row in told["clients"].items():
        assert table.loc[client, list(told["columns"])].to_dict() == row["scores"]
    assert table.loc["mean", "gain over local"] == told["mean"]["gain"]
    with pytest.raises(ValueError, match="nothing has been scored"):
        fedalt.Run(run.path).table("none")


def test_lines_are_the_record_with_a_column_for_each_number(run):
    lines = open_run(run.path).lines()
    assert len(run.lines()) == len(lines)
    train = run.lines("train")
    expected = [line["metrics"]["loss"] for line in lines if line["kind"] == "train"]
    assert train["metrics.loss"].tolist() == expected
    with pytest.raises(ValueError, match="no lines of kind 'trian', but train, "):
        run.lines("trian")


def test_a_file_and_a_dict_of_the_same_settings_make_the_same_run(run, tmp_path):
    again = fedalt.run(run.path / "settings.toml", out=tmp_path / "again")
    columns = ["own", "shared", "local", "base"]
    assert again.table()[columns].equals(run.table()[columns])
    assert (again.path / "settings.toml").read_text() == (run.path / "settings.toml").read_text()


def test_a_run_that_is_there_is_opened_and_never_written_over(run, tmp_path):
    assert fedalt.open_run(str(run.path)).table().equals(run.table())
    with pytest.raises(ValueError, match="exists already and is not empty"):
        fedalt.run(run.path / "settings.toml", out=run.path)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        fedalt.open_run(tmp_path)


def test_mistakes_in_a_dict_are_named_as_those_of_a_file(clients_dir, tiny_model_dir, tmp_path):
    wrong = settings(tiny_model_dir, clients_dir, rounds={"round": 2})
    with pytest.raises(ValueError, match=r"the settings: \[rounds\]: unknown key 'round'; did"):
        fedalt.run(wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_user_should_know_is_a_warning_and_stays_in_the_run(
    tiny_model_dir, clients_dir, tmp_path
):
    for client in "ab":
        for split in ("train", "test"):
            name = f"{client}.{split}.jsonl"
            (tmp_path / name).write_text((clients_dir / name).read_text())
    short = settings(tiny_model_dir, tmp_path, rounds={"rounds": 1, "test": False})
    with pytest.warns(UserWarning, match="there are two clients"):
        two = fedalt.run(short, out=tmp_path / "run")
    (warning,) = open_run(two.path).facts()["warnings"]
    assert warning.startswith("there are two clients")
    assert two.table("validation").loc["a", "score"] == "loss"
    with pytest.raises(ValueError, match="has no test losses yet"):
        two.plot_losses("test")


def test_a_client_answers_and_is_exported_as_by_the_commands(run, tmp_path, capsys):
    assert call("generate", run.path, "--client", "b", "ask 1b") == 0
    assert run.generate("b", "ask 1b") == capsys.readouterr().out.rstrip("\n")
    out = run.export("b", tmp_path / "mine")
    assert call("export", run.path, "--client", "b", "--out", tmp_path / "theirs") == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    with pytest.raises(ValueError, match="has no client 'd', but a, b, c"):
        run.generate("d", "ask")


def words_of(chart):
    """Every name and number in a chart's description and data."""
    return set(re.split(r"[^\w.-]+", json.dumps(chart.to_dict()).replace("\\n", " ")))


def test_charts_show_the_run_s_clients_and_numbers(run):
    pytest.importorskip("altair")
    last = run.lines("train").query("column == 'own' and client == 'c'")["metrics.loss"].iloc[-1]
    assert f"{last:.4g}" in words_of(run.plot_losses("train"))
    for draw in (run.plot_losses, run.plot_gains, run.plot_similarity, run.plot_mixer):
        assert {"a", "b", "c"} <= words_of(draw()), draw


def test_importing_the_package_brings_no_heavy_library():
    check = (
        "import sys\n"
        "import fedalt\n"
        "heavy = {'torch', 'transformers', 'peft', 'sklearn', 'numpy', 'pandas', 'altair'}\n"
        "print(sorted(heavy & set(sys.modules)), set(fedalt.__all__) <= set(dir(fedalt)))\n"
        "print(callable(fedalt.run), fedalt.Run.__name__, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\nTrue Run []\n"


def test_importing_the_package_takes_under_a_tenth_of_importing_torch():
    """In CPU time, the least of three, without the start of Python itself."""

    def seconds(statement):
        code = f"import time; {statement}; print(time.process_time())"
        return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))

    python = seconds("pass")

    assert seconds("import fedalt") - python < (seconds("import torch") - python) / 10


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fedalt' has no attribute 'nothing'"):
        fedalt.nothing  # noqa: B018
