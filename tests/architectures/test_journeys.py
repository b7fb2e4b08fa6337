"""Every architecture is planned, searched, exported in both layouts, verified and scored."""

import json
from pathlib import Path

import pytest
from cells import LAYOUTS, Journey
from published import ARCHITECTURES, BLOCK_FP8, save_published

from autoquant.source.headers import Headers
from autoquant.source.source import open_source
from autoquant.source.tensors import read_tensor

KINDS = (*ARCHITECTURES, *(f"{kind}-fp8" for kind in BLOCK_FP8))

WARNED = dict.fromkeys(("deepseek_v4", "zamba2"), ("no rul",))
"""How warnings of plans begin, but for those of what an engine does not load: matrices that no rule
knows stay."""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Pictures take longer than all the rest of a tiny search, and show nothing of it."""
    monkeypatch.setattr("autoquant.report.html.write_report", lambda record: None)


def stored(folder: Path) -> Headers:
    return Headers.read(tuple(sorted(folder.glob("*.safetensors"))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_goes_all_the_way(kind, autoquant, tmp_path):
    journey = Journey(save_published(kind, tmp_path / "source"), tmp_path, autoquant)
    plan = journey.plan()
    others = [line[:6] for line in plan["warnings"] if "is not known to load" not in line]
    assert others == [*WARNED.get(kind, ())]
    found = journey.search(plan)
    winner = journey.run / "checkpoint"
    assert journey.score(winner)["kl"] == found["kl"]
    assert found["kl"]["mean"] > found["noise_floor"]
    verified = journey.verify(winner)
    assert verified["bpe"] == found["bpe"]["checkpoint"]
    assert 8 * stored(winner).bytes / plan["elements"] == verified["bpe"]

    assignment = journey.mixes(plan)[0]
    exported = [journey.export(assignment, layout) for layout in LAYOUTS]
    counts = [journey.verify(folder)["linears"] for folder in exported]
    assert counts[0] == counts[1]
    assert min(counts[0].values()) > 0
    kl = [journey.score(folder)["kl"] for folder in exported]
    assert kl[0] == kl[1]

    source = open_source(journey.source)
    for folder in (winner, *exported):
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] != "fp8"
        for header in stored(folder):
            kept = source.headers.tensors.get(header.name)
            if kept is not None and kept.dtype == header.dtype:
                assert read_tensor(header).equal(read_tensor(kept))
