"""What several test files use."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads on a busy machine wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # readline in pytest's first process sets it for xdist's workers


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data and models that lie beside a developer's checkout, never in it."""
    folder = Path(os.environ.get("FEDALT_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder of data and models at {folder}; FEDALT_SHARED names one")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, saved as transformers saves them."""
    from runs_for_tests import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def clients_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of three clients, to be left as they are."""
    from runs_for_tests import write_clients

    return write_clients(tmp_path_factory.mktemp("data") / "clients")


@pytest.fixture(scope="session")
def run_flags(tiny_model_dir: Path, clients_dir: Path) -> tuple[str, ...]:
    """Flags of a `fedalt run` that takes seconds."""
    small = "--max-length 60 --max-new-tokens 3 --rank 2 --batch-size 4 --device cpu"
    return ("--model", str(tiny_model_dir), "--data", str(clients_dir), *small.split())


@pytest.fixture(scope="session")
def finished_run(run_flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds, to be left as it is."""
    from commands import call

    run = tmp_path_factory.mktemp("runs") / "finished"
    assert call("run", *run_flags, "--rounds", 2, "--out", run, "--quiet") == 0
    return run
