"""PyTorch's waiting threads give up their core, in every process that fedalt starts or is."""

import os
import re
import subprocess
import sys

import pytest

PYTHON = sys.executable
SPINS = "16000"
OF_THE_USER = {"GOMP_SPINCOUNT": "77", "OMP_WAIT_POLICY": "ACTIVE", "KMP_BLOCKTIME": "5"}
# What the installed script does.
COMMAND = "import sys; sys.argv = ['fedalt', 'methods']; from fedalt.cli import main; main()"
ENTRIES = {
    "python -m fedalt": ["-m", "fedalt", "methods"],
    "the command": [
        "-c",
        "import sys; sys.argv = ['fedalt', 'methods']; import fedalt.cli as c; c.main()",
    ],
    "a worker": ["-P", "-m", "fedalt.cli.process"],  # without its arguments it ends at once
    "import fedalt": ["-c", "import fedalt, torch"],
    "a module alone": ["-c", "import fedalt.training.loop"],
}


def spins(words: list[str], **environment: str) -> str:
    """What OpenMP itself says that it has read, the moment PyTorch loads it."""
    clean = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    told = subprocess.run(
        [PYTHON, *words],
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\w+)'", told)
    if found is None:
        assert "GOMP" not in told
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    return found[1]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_sets_a_small_spin_count_before_torch_is_loaded(entry):
    assert spins(ENTRIES[entry]) == SPINS


def test_the_processes_that_hold_a_connection_set_it_too():
    pytest.importorskip("flwr")
    code = "import os, fedalt.flower.fleet_client; print(os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if name not in OF_THE_USER}
    assert subprocess.check_output([PYTHON, "-c", code], env=clean).strip() == SPINS.encode()


@pytest.mark.parametrize("name", OF_THE_USER)
def test_what_the_user_has_set_stays(name):
    code = f"import os, fedalt; print({{n: os.environ.get(n) for n in {tuple(OF_THE_USER)}}})"
    clean = {each: value for each, value in os.environ.items() if each not in OF_THE_USER}
    told = subprocess.check_output(
        [PYTHON, "-c", code], env={**clean, name: OF_THE_USER[name]}, text=True
    )
    assert told.strip() == str({**dict.fromkeys(OF_THE_USER), name: OF_THE_USER[name]})


def test_a_torch_that_is_loaded_already_is_left_alone():
    assert spins(["-c", "import torch, fedalt"]) != SPINS
