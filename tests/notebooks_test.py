"""Every notebook runs from top to bottom in a fresh kernel."""

import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Jupyter machinery, which runs in this process
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    import jupytext
    import nbclient

    notebook = jupytext.read(path)
    assert any(cell.cell_type == "code" for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent.parent}},
    ).execute()


def test_there_are_notebooks():
    assert NOTEBOOKS
