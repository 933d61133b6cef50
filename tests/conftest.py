"""What several test files use."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads on a busy machine wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"


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
