"""The command for a GPU is known to work before there is one; other commands measure fairly."""

import gc
import importlib
import json
import random
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from weakref import ref

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


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules of benchmarks/, which their files import from one another."""
    monkeypatch.syspath_prepend(FILE.parent)

    def module(name):
        known = sys.modules.get(name)
        if known is not None and Path(known.__file__).parent != FILE.parent:
            monkeypatch.delitem(sys.modules, name)  # tests/ has a module of that name, too
        return importlib.import_module(name)

    return module


def test_a_model_is_gone_before_the_next_one_is_measured(benchmarks, monkeypatch):
    gpu, small = benchmarks("gpu"), benchmarks("step_variants").random_llama
    monkeypatch.setattr(gpu, "base_of", cache(lambda _: small(gpu.SMALL)))
    monkeypatch.setattr(gpu, "LLAMA_2_7B", gpu.SMALL)
    measured = gpu.models("cpu", tiny=False)
    _, model = next(measured)
    weight = ref(model.get_input_embeddings().weight)
    del model
    name, _ = next(measured)
    gc.collect()
    assert name == "Llama-2-7B's shape"
    assert weight() is None


def test_a_process_of_a_federation_that_fails_ends_the_others(benchmarks):
    end_well = benchmarks("federation").end_well

    def started(*programs):
        return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]

    assert end_well(started("", ""))
    processes = started("import time; time.sleep(600)", "raise SystemExit(3)")
    assert not end_well(processes)
    assert [each.returncode for each in processes] == [-signal.SIGTERM, 3]


@pytest.mark.parametrize("who", ["flwr", "flower-superlink"])
def test_an_app_of_flowers_that_fails_ends_its_variant_with_its_last_words(
    benchmarks, monkeypatch, tmp_path, who
):
    federation = benchmarks("federation")
    for name in ("flwr", "flower-superlink", "flower-supernode"):  # in the place of Flower's own
        stays = "exit 0" if name == "flwr" else "exit 3" if name == who else "exec sleep 600"
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} $1 has failed\n{stays}\n")
        program.chmod(0o700)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        assert len(waits) < 1000, "it waits for ever"
        pause(0.01)

    pause = federation.time.sleep
    monkeypatch.setattr(federation.time, "sleep", sleep)
    monkeypatch.setattr(federation.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(federation.experiment, "clients_of", lambda _: ["a"])
    last = "SuperLink has ended with code 3 .*:\nflower-superlink --ssl-ca-certfile has failed"
    if who == "flwr":
        last = "app has ended with code 0 .*:\nflwr run has failed"
    with pytest.raises(SystemExit, match=last):
        federation.run_flower(tmp_path, rank=1, rounds=2, port=1)


def test_records_with_any_sign_that_ends_a_line_are_dealt_out_whole(benchmarks, tmp_path):
    records = [{"sentence": f"one\u2028two\x85 {number}"} for number in range(4)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "task.train.jsonl").write_text(text, encoding="utf-8")
    deal = benchmarks("clients_of_tasks").deal
    assert deal(tmp_path, tmp_path, "task", "train", clients=2, size=9, seed=0) == 2
    dealt = [
        json.loads(line)
        for client in range(2)
        for line in (tmp_path / f"task-{client}.train.jsonl").open(encoding="utf-8")
    ]
    assert sorted(dealt, key=lambda record: record["sentence"]) == records


def test_a_corpus_without_a_whole_sequence_ends_pretraining_at_once(monkeypatch):
    monkeypatch.syspath_prepend(FILE.parents[1] / "scripts")
    drawn = importlib.import_module("pretrain_tiny_base").forever

    class Impatient(random.Random):
        def shuffle(self, items):
            assert items

    assert next(drawn([7], Impatient())) == 7
    with pytest.raises(SystemExit, match="too small"):
        next(drawn([], Impatient()))


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True)
    assert done.returncode == 2
    assert "PyTorch sees no GPU here; --tiny tries all of this on a CPU" in done.stderr
