"""A search whose weights are cut over the memory of its processes finds what one process finds."""

import json

import pytest
import torch
from launched import in_this_process, torchrun
from searchable import TOKEN_FLAGS, save_searchable, save_text
from test_other_launchers import TOKENS, measured

import autoquant
from autoquant.codes.held import Weights
from autoquant.model.streaming import kept, placement
from autoquant.model.streaming.kept import Gpus
from autoquant.model.streaming.shared import HostMemory

pytestmark = pytest.mark.slow

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def search(folder, run):
    found = autoquant.search(
        folder / "model",
        budget_bpe=9.0,
        calibration=str(folder / "text"),
        **TOKENS,
        trials=2,
        effort="fast",
        mlflow=False,
        export=False,
        out=run,
    )
    return measured(found.result)


def in_a_process(rank, rendezvous, folder):
    """As on a GPU, of which the CPU's memory takes the place."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gpus, "together", lambda device, neighbours: Gpus(len(neighbours)))
        patch.setattr(kept, "GpuMemory", lambda device: HostMemory())
        patch.setattr(placement, "_in_order", lambda asked, **may: (Weights.SHARDED,))
        found = search(folder, folder / "sharded")
    (folder / f"sharded-{rank}.json").write_text(found)
    torch.distributed.destroy_process_group()


def test_pieces_of_processes_give_what_one_process_gives(tmp_path):
    save_searchable("minimax_m2", tmp_path / "model", num_hidden_layers=3)
    save_text(tmp_path / "text")
    alone = search(tmp_path, tmp_path / "alone")
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path / "rendezvous"), tmp_path), nprocs=2)
    assert [(tmp_path / f"sharded-{rank}.json").read_text() for rank in (0, 1)] == [alone] * 2
    work = (tmp_path / "sharded" / "work.jsonl").read_text().splitlines()
    brought = sum(json.loads(line)["blocks_brought"] for line in work)
    assert brought > 3 * 4, "every pass brings the blocks"


@needs_two_gpus
def test_two_gpus_find_the_same_with_weights_on_both_and_on_each(tmp_path):
    model = save_searchable("minimax_m2", tmp_path / "model", num_hidden_layers=3)
    text = save_text(tmp_path / "text")
    words = ("search", model, "--budget-bpe", 9, "--calibration", text, *TOKEN_FLAGS)
    flags = (*words, "--trials", 2, "--no-mlflow", "--no-export", "--device", "cuda")
    found = {}
    for weights in ("sharded", "resident"):
        run = tmp_path / weights
        ended = torchrun(2, (*flags, "--weights", weights, "--out", run))
        assert ended.returncode == 0, ended.stderr
        found[weights] = measured(json.loads((run / "result.json").read_text()))
    assert found["sharded"] == found["resident"]
    in_this_process((*flags, "--out", tmp_path / "alone"))
    assert (
        measured(json.loads((tmp_path / "alone" / "result.json").read_text()))
        == (found["resident"])
    )
