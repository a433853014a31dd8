"""Every notebook runs from top to bottom in a fresh kernel."""

import os
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.py"))
SHIPPED = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Jupyter machinery, which runs in this process
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    import jupytext
    import nbclient

    cache = os.environ.get("MOELAB_CACHE") or path.parent.parent / "cache"
    monkeypatch.setenv("MOELAB_CACHE", str(cache))  # shared: the data need not be built for each
    notebook = jupytext.read(path)
    assert any(cell.cell_type == "code" for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},  # where Jupyter opens it
    ).execute()


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_notebook_has_the_outputs_of_its_source(path):
    """Two are kept with outputs, for readers without a kernel: same cells as the .py, every code cell run, in order."""
    import jupytext

    source, shipped = jupytext.read(path.with_suffix(".py")), jupytext.read(path)
    assert [cell.source for cell in shipped.cells] == [cell.source for cell in source.cells]
    code = [cell for cell in shipped.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert any(cell.outputs for cell in code)
    text = path.read_text(encoding="utf-8")
    assert "Traceback" not in text and "/tmp/" not in text and str(path.parent.parent) not in text


def test_two_notebooks_are_shipped():
    assert len(SHIPPED) >= 2
