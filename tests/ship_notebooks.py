"""Runs the notebooks that are kept with outputs and writes them as .ipynb: `make notebooks`, after a change to one."""

import pathlib

import jupytext
import nbclient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
SHIPPED = ("fp4_bit_by_bit", "routing_seen")


def ship(path):
    """Executes a notebook and writes it beside its source, without what changes from run to run."""
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": FOLDER.parent}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)
    jupytext.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    for name in SHIPPED:
        ship(FOLDER / f"{name}.py")
