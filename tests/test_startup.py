"""Commands that need no tensors never import what works with them."""

import shutil
import subprocess
import sys

import pytest
from federations import founded

from fedalt.report.cells import collect
from fedalt.report.comparison import write_results
from fedalt.runs.compare import Entry, jobs_of
from fedalt.runs.settings import read_settings

HEAVY = ("torch", "transformers", "peft", "sklearn", "scipy", "numpy", "pandas")
ARRAYS = ("scipy", "numpy", "pandas")  # which a page's gaps, tree and charts are made with
NOTHING_HEAVY = ["code 0", "heavy []"]
CHECK = """
import sys
sys.argv = ["fedalt", *sys.argv[1:]]
from fedalt.cli import main
try:
    main()
except SystemExit as end:
    print("code", end.code)
print("heavy", sorted(set({heavy!r}) & set(sys.modules)))
"""


def modules_after(*words: object, allowed: tuple[str, ...] = ()) -> list[str]:
    """The heavy libraries in a process that has run a command, and the command's exit code."""
    check = CHECK.format(heavy=tuple(name for name in HEAVY if name not in allowed))
    done = subprocess.run(
        [sys.executable, "-c", check, *map(str, words)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("methods",),
        ("methods", "--json"),
        ("run", "--help"),
        ("federation", "--help"),
        ("compare", "--help"),
        ("serve", "--help"),
    ],
    ids=" ".join,
)
def test_help_and_lists_import_no_heavy_library(words):
    assert modules_after(*words) == NOTHING_HEAVY


def test_watching_a_run_imports_no_heavy_library(finished_run):
    assert modules_after("watch", finished_run, "--once") == NOTHING_HEAVY


def test_tracking_a_run_imports_nothing_but_the_tracker(finished_run, tmp_path):
    run = tmp_path / "run"  # what is written beside the record would stay for other tests
    shutil.copytree(finished_run, run)
    # TensorBoard itself needs numpy.
    said = modules_after(
        "track", run, "--report-to", "tensorboard", allowed=("numpy", "pandas", "scipy")
    )
    assert said == NOTHING_HEAVY


def test_a_run_is_reported_without_tensors(finished_run, tmp_path):
    page = tmp_path / "page.html"
    assert modules_after("report", finished_run, "--out", page, allowed=ARRAYS) == NOTHING_HEAVY
    assert 'data-figure="similarity"' in page.read_text()


def test_a_comparison_is_reported_without_tensors(finished_run, tmp_path):
    out = tmp_path / "compared"
    shutil.copytree(finished_run, out / "fedalt" / "seed-0")
    entries = [Entry("fedalt", read_settings(finished_run / "settings.toml"))]
    write_results(out, collect(entries, (0,), jobs_of(entries, (0,), out)))
    assert modules_after("report", out, allowed=ARRAYS) == NOTHING_HEAVY
    assert "Learning curves" in (out / "report.html").read_text()


def test_a_federations_folder_is_reported_without_tensors(tiny_model_dir, tmp_path):
    made = founded(tmp_path, tiny_model_dir, rounds={"rounds": 1})
    made.go_on()
    assert modules_after("report", made.run, allowed=ARRAYS) == NOTHING_HEAVY
    assert "made of what stays with the clients" in (made.run / "report.html").read_text()


@pytest.mark.parametrize("module", ["fedalt.flower.gateway", "fedalt.flower.fleet_client"])
def test_the_processes_at_the_network_need_no_tensors(module):
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert not any(name in found for name in ("torch", "transformers", "peft", "sklearn"))
