"""Static input scales: headroom over what calibration saw, its bound, and what they clip."""

import json

import pytest
import torch
from click.testing import CliRunner
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.formats import FP8, NVFP4
from autoquant.formats.input_range import InputRange
from autoquant.measure.calibration import Calibration
from autoquant.model.inputs import Clips, InputScale, InputSet, small_of


@pytest.mark.parametrize(
    ("amax", "small", "factor", "expected"),
    [
        (3.0, None, 2.0, 6.0),
        (3.0, 1.0, 2.0, 6.0),
        (3.0, 1.0, 1.0, 3.0),
        (28672.0, 1.5, 2.0, 43008.0),
        (28672.0, 0.5, 2.0, 28672.0),
    ],
)
def test_headroom_ends_where_scales_of_small_blocks_would_be_subnormal(
    amax, small, factor, expected
):
    assert InputRange(amax=amax, small=small).with_headroom(factor) == expected


def observed(*tensors):
    inputs = InputSet("x", observing=True)
    for x in tensors:
        inputs.observe(x)
    return inputs


def test_ninety_nine_blocks_of_a_hundred_are_not_below_what_is_called_small():
    """Zero blocks have no scale to speak of; a hundredth of the others may be smaller."""
    x = torch.zeros(300, 16)
    x[:200] = 1.5
    x[:2, 1:] = 2.0**-9
    x[:2, 0] = -(2.0**-8) * 1.5
    assert small_of(observed(x).sizes) == 1.0
    x[2, :] = 2.0**-20
    assert small_of(observed(x).sizes) == 2.0**-8
    halves = observed(x[:100].bfloat16(), x[100:].bfloat16())
    assert small_of(halves.sizes) == 2.0**-8
    assert small_of(observed(torch.zeros(4, 32)).sizes) is None
    assert observed(torch.ones(4, 24)).sizes is None, "no blocks of 16"


@pytest.mark.parametrize("choice", [NVFP4, FP8])
def test_what_a_scale_does_not_hold_is_counted_once(choice):
    inputs, clips = InputSet("x", scale=InputScale(amax=1.7)), Clips()
    x = torch.full((4, 16), 1.7)
    inputs.quantize(x, choice.format, clips)
    assert clips.counted() == {"x": (0, 64)}
    x = x.clone()
    x[1, :3] = -1.71
    for _ in range(2):
        inputs.quantize(x, choice.format, clips)
    assert clips.counted() == {"x": (3, 128)}
    stored = choice.format.input_scale(1.7)
    assert choice.format.largest_input(stored) == pytest.approx(1.7, rel=1e-5)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The same search without headroom and with it."""
    folder = tmp_path_factory.mktemp("headroom")
    model, text = save_searchable("llama", folder / "model"), save_text(folder / "text")
    flags = ("--calibration", text, *TOKEN_FLAGS, "--trials", 0, "--no-mlflow", "--effort", "fast")

    def search(headroom):
        run = folder / str(headroom)
        call = (
            "search",
            model,
            "--budget-bpe",
            9,
            "--out",
            run,
            *flags,
            "--calibration-tokens",
            32,
        )
        done = CliRunner().invoke(cli, [str(a) for a in (*call, "--input-headroom", headroom)])
        assert done.exit_code == 0, done.stderr
        return run, done.stdout

    return {headroom: search(headroom) for headroom in (1, 4)}


@pytest.mark.slow
def test_headroom_spares_fresh_text_what_calibration_did_not_see(searched):
    found = {}
    for headroom, (run, output) in searched.items():
        inputs = json.loads((run / "result.json").read_text())["inputs"]
        assert inputs["headroom"] == headroom
        assert inputs["elements"] > 0
        assert sum(0 < share < 1 for share in inputs["groups"].values()) == len(inputs["groups"])
        assert (inputs["clipped"] > 0) == bool(inputs["groups"])
        assert "times the largest calibration input" in output
        assert "times the largest calibration input" in (run / "report.html").read_text()
        found[headroom] = inputs["clipped"]
    assert found[1] > 0
    assert found[4] < found[1]


@pytest.mark.slow
def test_a_checkpoint_stores_the_scales_that_were_scored(searched):
    for headroom, (run, _) in searched.items():
        calibration = Calibration.from_dict(json.loads((run / "calibration.json").read_text()))
        assert calibration.headroom == headroom
        ranges = calibration.ranges()
        assert {name: headroom * amax for name, amax in calibration.input_amax.items()} == ranges
        done = CliRunner().invoke(cli, ["verify", str(run / "checkpoint")])
        assert done.exit_code == 0
        scored = CliRunner().invoke(
            cli,
            [
                *("score", str(run.parent / "model"), "--checkpoint", str(run / "checkpoint")),
                *("--calibration", str(run.parent / "text"), *map(str, TOKEN_FLAGS)),
                *("--calibration-tokens", "32", "--format", "json"),
            ],
        )
        result = json.loads((run / "result.json").read_text())
        assert json.loads(scored.stdout)["kl"] == result["kl"]
