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
