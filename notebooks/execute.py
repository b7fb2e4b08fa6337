"""Run notebooks and keep what they show: `python notebooks/execute.py [NAME...]`.

The text of a notebook is NAME.py, which reads and merges as code. NAME.ipynb is that text with the
outputs of one run, for whoever looks at it without running it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def sources() -> list[Path]:
    """The text of every notebook, in reading order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def execute(source: Path, folder: Path) -> Any:
    """The notebook with the outputs of a run in a kernel of its own that starts in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; with its traceback.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # random otherwise, and so a change in every commit
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    alone = {"OMP_NUM_THREADS": "1"}  # threads wait for each other on a busy core
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # progress bars as widgets
    return client.execute(env={**alone, **os.environ, **quiet})


def main(names: list[str]) -> None:
    """Run the named notebooks, by default all, and write each one's outputs beside its text."""
    import tempfile

    for source in sources():
        if names and source.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(source, Path(folder)), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
