"""Garbage collection rests while the command line imports, and nowhere else."""

import gc
import signal
import sys

import pytest
import torch
from searchable import save_searchable

from autoquant import cli
from autoquant.model.loading import load_model

CPU = torch.device("cpu")


def test_the_command_line_collects_from_its_model_on_and_not_what_it_imported(
    tmp_path, monkeypatch
):
    folder = save_searchable("llama", tmp_path / "model")
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["autoquant", "--version"])
    gc.unfreeze()
    try:
        with pytest.raises(SystemExit):
            cli.main()
        assert not gc.isenabled()
        load_model(folder, CPU)
        assert gc.isenabled()
        frozen = gc.get_freeze_count()
        assert frozen > 100_000
        load_model(folder, CPU)  # as a program that calls the API does
        assert gc.get_freeze_count() <= frozen
    finally:
        signal.signal(signal.SIGTERM, handler)
        gc.enable()
        gc.freeze()  # what was before the test
