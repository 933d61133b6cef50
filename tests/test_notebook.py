"""The notebook among the examples runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown(notebook, source):
    """What the first cell with this source shows, by the kind of data."""
    cell = next(cell for cell in notebook.cells if source in cell.source)
    (output,) = [each for each in cell.outputs if "data" in each]
    return output["data"]


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    pytest.importorskip("altair")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    for client in ("commonsense", "structure", "worst client"):
        assert client in shown(notebook, "run.table()")["text/html"]
    for chart in ("plot_losses", "plot_mixer", "plot_similarity"):
        assert "vega" in shown(notebook, chart)["text/html"], chart
    assert shown(notebook, "run.generate")["text/plain"].startswith("'")
    assert "adapter_model.safetensors" in shown(notebook, "run.export")["text/plain"]
