"""Notebooks run from nothing, and what is shown of them is their text."""

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
from searchable import save_searchable

FOLDER = Path(__file__).parents[2] / "notebooks"
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""

jupytext = pytest.importorskip("jupytext", reason="jupytext: the extra `test` brings it")
nbformat = pytest.importorskip("nbformat", reason="nbformat: the extra `test` brings it")


def _runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = _runner()
SOURCES = RUNNER.sources()


@pytest.fixture(params=SOURCES, ids=[source.stem for source in SOURCES])
def source(request) -> Path:
    return request.param


def kinds(notebook) -> list[list[str]]:
    """What each code cell shows: text, tables or pictures, in order."""
    return [
        sorted({kind for output in cell.outputs for kind in output.get("data", {})})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_outputs_belong_to_the_text(source):
    shown = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    text = jupytext.read(source)
    assert [(c.cell_type, c.source) for c in shown.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]
    for cell in shown.cells:
        if cell.cell_type == "code":
            assert cell.execution_count
            said = "".join(o.text for o in cell.outputs if o.get("name") == "stderr")
            assert not re.search("Warning|Traceback|packages/", said), "noise of a library"


def test_a_notebook_with_its_outputs_is_small(source):
    assert source.with_suffix(".ipynb").stat().st_size < LARGEST


SMALLER = """
from pathlib import Path

from autoquant import collector

collector.rest()  # as in a command, until a model is loaded

import autoquant.api
import autoquant.run.opening
import autoquant.source.source

for module in (autoquant.run.opening, autoquant.source.source):
    module.REFERENCE_MODEL = Path({folder!r})
search = autoquant.api._search


def search_less(settings, observer):
    half = {{n: settings[n] // 2 for n in settings if n.endswith("_tokens") and settings[n]}}
    return search(settings | half, observer)


autoquant.api._search = search_less
"""


@pytest.fixture(scope="module")
def smaller(tmp_path_factory) -> Path:
    """A folder for the path, which gives every process a smaller model than the bundled one, of
    the same architecture with half as many layers, and half of a notebook's tokens.
    """
    folder = tmp_path_factory.mktemp("smaller")
    model = save_searchable(
        "minimax_m2",
        folder / "model",
        num_hidden_layers=3,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        tie_word_embeddings=True,
    )
    (folder / "sitecustomize.py").write_text(SMALLER.format(folder=str(model)))
    return folder


@pytest.mark.slow
def test_a_notebook_runs_from_nothing_and_shows_the_same_kinds(
    source, smaller, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(smaller), prepend=os.pathsep)
    ran = RUNNER.execute(source, tmp_path)
    assert kinds(ran) == kinds(nbformat.read(source.with_suffix(".ipynb"), as_version=4))
