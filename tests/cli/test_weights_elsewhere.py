"""A search whose weights come from the host's memory or from the disk ends as any other."""

import json

import pytest
from records import trials_of
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.model.streaming.blocks import BlockReader
from autoquant.source.headers import stored_bytes
from autoquant.source.source import open_source
from autoquant.store.run_directory import WORK, read_records

SAME = ("assignment.yaml", "calibration.json", "sensitivity.json", "noise.json", "groups.json")


@pytest.fixture(scope="module", params=["llama", "minimax_m2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_searchable(request.param, folder / "model", num_hidden_layers=3)
    save_text(folder / "text")
    return folder


@pytest.fixture
def search(autoquant, folder, tmp_path):
    def call(name, *flags, code=0):
        run = tmp_path / name
        result = autoquant(
            *("search", folder / "model", "--budget-bpe", 9, "--calibration", folder / "text"),
            *(*TOKEN_FLAGS, "--no-mlflow", "--trials", 6, "--out", run, *flags),
        )
        assert result.exit_code == code, result.stderr
        return run

    return call


def outcome(run):
    """What a run left, without times and names of folders."""
    result = json.loads((run / "result.json").read_text())
    for row in result["stages"]:
        row.pop("seconds")
    trials = trials_of(run)
    exported = json.loads((run / "checkpoint" / "autoquant.json").read_text())
    left_out = ("seconds", "command", "checkpoint", "checksum")
    return (
        {name: value for name, value in result.items() if name not in left_out},
        [{**trial, "seconds": 0.0} for trial in trials],
        exported["sha256"],
        {name: (run / name).read_bytes() for name in SAME},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "at_once"), [("host", 1), ("disk", 4)])
def test_results_and_codes_are_those_of_weights_in_memory(search, weights, at_once):
    """One trial at a time from the disk: in `tests/ranks`."""
    flags = ("--trials-at-once", at_once)
    expected = outcome(search("resident", *flags, "--weights", "resident"))
    assert outcome(search(weights, *flags, "--weights", weights)) == expected


@pytest.mark.slow
def test_a_search_from_disk_reads_each_block_a_few_times(search, folder, monkeypatch):
    """Check, shared inputs, calibration, gradients (twice; the last block stays), noise (twice),
    probes, and a pass for each batch of trials and of the confirmation.
    """
    read, reading = [], BlockReader.read

    def counted(reader, block):
        read.append(block)
        return reading(reader, block)

    monkeypatch.setattr(BlockReader, "read", counted)
    run = search("disk", "--weights", "disk", "--trials-at-once", 64, "--no-export")
    assert 3 * 9 <= len(read) <= 3 * 18
    work = read_records(run, WORK)
    assert sum(stage["blocks_brought"] for stage in work) == len(read)
    headers = open_source(folder / "model").headers
    block = stored_bytes(header for header in headers if ".layers.0." in header.name)
    assert sum(stage["bytes_brought"] for stage in work) == len(read) * block


@pytest.mark.slow
def test_probes_of_streamed_weights_make_each_code_a_few_times(search):
    """Gradients of each batch ask for every choice of a block, exact probes for one of a group."""

    def encoded(run):
        return sum(s["weights_encoded"] for s in read_records(run, WORK) if s["stage"] == "probe")

    flags = ("--effort", "fast", "--no-export", "--trials", 0)
    once = encoded(search("resident", *flags, "--weights", "resident"))
    assert once < encoded(search("disk", *flags, "--weights", "disk")) < 1.5 * once


def test_what_does_not_fit_is_refused_with_what_would(search, capsys):
    run = search("small", "--weights", "resident", "--host-memory", "64MiB", code=6)
    assert not (run / "result.json").exists()
