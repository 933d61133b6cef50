"""Commands that need no tensors never import what works with them."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "sklearn", "scipy", "numpy", "pandas")
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
    assert modules_after(*words) == ["code 0", "heavy []"]


def test_watching_a_run_imports_no_heavy_library(finished_run):
    assert modules_after("watch", finished_run, "--once") == ["code 0", "heavy []"]


def test_tracking_a_run_imports_nothing_but_the_tracker(finished_run):
    # TensorBoard itself needs numpy.
    said = modules_after(
        "track", finished_run, "--report-to", "tensorboard", allowed=("numpy", "pandas", "scipy")
    )
    assert said == ["code 0", "heavy []"]


@pytest.mark.parametrize("module", ["fedalt.flower.gateway", "fedalt.flower.fleet_client"])
def test_the_processes_at_the_network_need_no_tensors(module):
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert not any(name in found for name in ("torch", "transformers", "peft", "sklearn"))
