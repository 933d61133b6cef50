"""The command for a GPU is known to work before there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_gpu_command_proves_and_measures_in_its_small_form():
    done = subprocess.run([sys.executable, FILE, "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    proved = {row["what"]: row["holds"] for row in rows if "holds" in row}
    assert len(proved) == 8
    assert set(proved.values()) == {"yes"}
    (step,) = [row for row in rows if "tokens/s, fused" in row]
    assert step["clients"] == 8
    (memory,) = [row for row in rows if "memory, GiB" in row]
    assert memory["memory, GiB"] == "nan"  # a CPU does not tell


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True)
    assert done.returncode == 2
    assert "PyTorch sees no GPU here; --tiny tries all of this on a CPU" in done.stderr
