"""`autoquant plan --measure`: one block is run here, and the forecast's counts make it a search."""

import json
import weakref

import pytest
from searchable import TOKEN_FLAGS, save_searchable

from autoquant.codes.held import Weights
from autoquant.forward.backward import Backward
from autoquant.forward.flow import Flows
from autoquant.forward.taps import Taps
from autoquant.model.streaming.blocks import BlockReader
from autoquant.run.config import PlanConfig
from autoquant.run.machines import bench, passes
from autoquant.run.machines.bench import BlockSeconds
from autoquant.run.machines.computed import Computed
from autoquant.run.machines.forecast import Forecast
from autoquant.run.machines.passes import Passes, Streaming, forecast_passes
from autoquant.run.machines.timing import seconds_of
from autoquant.run.opening import open_plan

FLAGS = (*TOKEN_FLAGS, "--device", "cpu", "--budget-bpe", 9)
LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timed") / "model"
    return save_searchable("minimax_m2", folder, num_hidden_layers=LAYERS)


@pytest.fixture
def read(monkeypatch):
    """Numbers of the blocks that are read."""
    found, reading = [], BlockReader.read

    def counted(reader, block):
        found.append(block)
        return reading(reader, block)

    monkeypatch.setattr(BlockReader, "read", counted)
    return found


def measured(autoquant, *arguments):
    result = autoquant("plan", *arguments, "--measure", "--format", "json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("weights", ["resident", "disk"])
def test_every_part_of_the_forecast_has_a_time(autoquant, model, read, weights):
    found = measured(autoquant, model, *FLAGS, "--effort", "fast", "--weights", weights)
    forecast, timing = found["forecast"], found["timing"]
    assert forecast["weights"] == weights
    assert [*timing["seconds"]] == [
        *("load", "calibrate", "probe", "solve", "refine", "confirm", "export", "total")
    ]
    if weights == "disk":
        assert [*timing["seconds"]][:-2] == [*forecast["passes"]]
    *parts, total = timing["seconds"].values()
    assert min(parts) > 0.0
    assert total == pytest.approx(sum(parts))
    assert (timing["device"], timing["layer"], timing["tokens"]) == ("cpu", LAYERS - 1, 256)
    assert set(read) <= {0, 1, LAYERS - 1}, "the others may not fit"
    assert timing["measured"]["fitted"] == 0.0


def test_codes_that_rest_on_inputs_are_timed_too(autoquant, model, read):
    found = measured(autoquant, model, *FLAGS, "--weights", "disk")["timing"]
    assert [*found["seconds"]][2] == "statistics"
    assert found["measured"]["fitted"] > 0.0
    assert found["measured"]["summed"] > 0.0
    assert found["measured"]["weighed"] > 0.0
    assert set(read) <= {0, 1, LAYERS - 1}


def test_a_space_of_fitted_codes_alone_has_a_time(autoquant, model, tmp_path, monkeypatch):
    run, seen = bench.Bench._run, []
    monkeypatch.setattr(
        bench.Bench,
        "_run",
        lambda own, assignment, **how: seen.append(assignment) or run(own, assignment, **how),
    )
    space = tmp_path / "fitted.yaml"
    space.write_text(
        "schema_version: 1\nname: fitted\nrules: [{match: '*', formats: [fp8/gptq, bf16]}]"
    )
    timing = measured(autoquant, model, *FLAGS, "--space", space)["timing"]
    assert all(seconds > 0 for seconds in timing["seconds"].values())
    assert {str(choice) for own in seen for _, choice in own} == {"fp8"}


def test_candidates_are_timed_behind_gradients_with_what_those_found_in_memory(
    autoquant, model, monkeypatch
):
    """As in a search: what lies in the heap decides whether a forward needs fresh pages."""
    seen, found = [], []

    class SeenFlows(Flows):
        def visit(self, stage):
            if any(flow.assignment.quantized for flow in self.flows):
                seen.append(all(taps() is not None for taps in found))
            super().visit(stage)

    class SeenBackward(Backward):
        def visit(self, stage):
            seen.append("backward")
            super().visit(stage)

    class SeenTaps(Taps):
        def __init__(self, *given):
            super().__init__(*given)
            found.append(weakref.ref(self))

    for own in (SeenFlows, SeenBackward, SeenTaps):
        monkeypatch.setattr(bench, own.__name__.removeprefix("Seen"), own)
    measured(autoquant, model, *FLAGS, "--effort", "fast", "--weights", "disk")
    behind = seen[seen.index("backward") :]
    assert behind == seen, "a candidate before"
    *gradients, last = (place for place, own in enumerate(seen) if own == "backward")
    assert len(gradients) == last == bench.REPEATS
    assert seen[last + 1 :] == [True] * (len(seen) - last - 1)
    assert len(seen) - last - 1 >= bench.REPEATS, "no candidate"


def test_what_is_not_timed_is_said(autoquant, model):
    result = autoquant("plan", model, *FLAGS, "--effort", "max", "--measure")
    assert result.exit_code == 0, result.stderr
    assert "; without the polish\n" in result.stdout


def test_time_is_said_with_what_it_was_measured_on(autoquant, model):
    result = autoquant("plan", model, *FLAGS, "--effort", "fast", "--measure")
    assert result.exit_code == 0, result.stderr
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    assert lines["time"].strip().startswith("about ")
    assert f"block {LAYERS - 1} with 256 tokens on cpu" in lines["measured"]
    assert "in memory" in lines


def test_without_a_budget_nothing_is_said_of_an_export(autoquant, model):
    found = measured(autoquant, model, *TOKEN_FLAGS, "--device", "cpu", "--effort", "fast")
    assert "export" not in found["timing"]["seconds"]
    assert found["timing"]["seconds"]["confirm"] > 0.0


def test_weights_have_to_be_there(autoquant, tmp_path):
    model = save_searchable("llama", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"")
    result = autoquant("plan", model, *FLAGS, "--measure")
    assert result.exit_code == 4
    assert "model.safetensors" in result.stderr


def test_a_space_without_a_group_in_blocks_cannot_be_measured(autoquant, model, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(
        "schema_version: 1\nname: head\nrules:\n"
        "  - {match: head, formats: [fp8, bf16]}\n"
        "  - {match: '*', formats: [bf16]}\n"
    )
    result = autoquant("plan", model, "--space", space, "--measure")
    assert result.exit_code == 4
    assert "no block has a group that is searched" in result.stderr


def parts_of(model, **settings):
    few = {"sequence_length": 32, "batch_tokens": 256, "search_tokens": 512, "report_tokens": 512}
    own = {"device": "cpu", "weights": "disk", "host_memory": "2GiB", "effort": "fast"}
    config = PlanConfig.of({"model": str(model), **own, **few, **settings})
    return Forecast.of(config, open_plan(config)).parts


def test_the_noise_floor_is_a_forward_of_its_own(model):
    """Screened probes need it, in the pass of the calibration; the confirmation shows it."""
    screened, gradient = (parts_of(model, probe=own) for own in ("screened", "gradient"))
    assert [own["calibrate"].computed.forwards for own in (screened, gradient)] == [3.0, 2.0]
    assert screened["confirm"].computed.forwards == 3.0
    resident = {"weights": "resident", "search_tokens": 256}
    screened, gradient = (
        parts_of(model, probe=own, **resident)["probe"].computed for own in ("screened", "gradient")
    )
    exact = 1 + screened.probed * sum(range(1, LAYERS + 1)) / LAYERS**2
    assert screened.forwards - gradient.forwards == pytest.approx(1 + exact)


def test_logits_of_the_bf16_model_are_computed_once_where_memory_keeps_them(model, monkeypatch):
    once = {name: own.computed for name, own in parts_of(model).items()}
    assert [once[name].referred for name in ("probe", "solve", "refine", "confirm")] == [2, 0, 0, 2]
    monkeypatch.setattr(passes, "KEPT_LOGIT_BYTES", 0)
    anew = {name: own.computed for name, own in parts_of(model).items()}
    for name in ("solve", "refine"):
        assert anew[name].referred == anew[name].compared > 0.0
    assert anew["probe"].referred == 2.0 + anew["probe"].probed
    assert anew["confirm"].referred == 2.0 + anew["confirm"].scored


def statistics_of(model, state_bytes, *, is_streamed=True):
    few = {"sequence_length": 32, "batch_tokens": 256, "search_tokens": 512}
    config = PlanConfig.of({"model": str(model), "calibration_tokens": 512, **few})
    own = Streaming(stages=4, width=8, state_bytes=state_bytes, is_streamed=is_streamed)
    found = forecast_passes(config, open_plan(config), own)
    return found["statistics"], found["calibrate"].computed.forwards


def test_gradients_that_weigh_rows_count_with_what_they_begin_with(model):
    """In one pass back where memory holds the states between all blocks: of 512 calibration tokens,
    of as many search tokens where their forward goes along too, and of the calibration's own.
    """
    rows = search = 4 * 512 * 8 * 2
    calibration = 512 * 8 * 2

    def check(found, passes, *, statistics, calibrate):
        part, along = found
        assert part.passes == passes
        assert (part.computed.summed, part.computed.weighed) == (2.0, 2.0)
        assert (part.computed.forwards, along) == (statistics, calibrate)

    whole = statistics_of(model, rows + search + calibration)
    check(whole, 1, statistics=0.0, calibrate=2.0 + 3.0)
    less = statistics_of(model, rows + search + calibration - 1)
    check(less, 2, statistics=2.0, calibrate=3.0)
    least = statistics_of(model, rows)
    check(least, 2, statistics=2.0, calibrate=0.0)
    half = statistics_of(model, rows // 2)
    check(half, 2 * 2 + 1, statistics=2.0, calibrate=0.0)
    resident = statistics_of(model, rows, is_streamed=False)
    check(resident, 2 * 16 + 1, statistics=2.0, calibrate=0.0)


def test_there_is_one_wave_where_a_race_needs_all_sequences(model):
    eight, four = (
        parts_of(model, batch_tokens=32 * own, search_tokens=64 * own, trials=12)["refine"]
        for own in (8, 4)
    )
    assert (eight.passes, eight.usual) == (2 * four.passes, 2 * four.usual)


NOTHING = dict.fromkeys(
    (
        *("opened", "read", "brought", "observed", "forward", "candidate", "backward", "summed"),
        *("encoded", "fitted", "pulled", "referred", "compared", "probed", "scored"),
        *("weighed", "written_byte"),
    ),
    0.0,
)


@pytest.mark.parametrize(
    ("does", "units", "expected"),
    [
        ({"forwards": 3.0}, {"forward": 2.0}, 60.0),
        ({"observed": 3.0, "candidates": 2.0}, {"observed": 1.0, "candidate": 4.0}, 110.0),
        ({"backwards": 2.0}, {"backward": 5.0, "pulled": 7.0}, 2 * (50.0 + 7.0)),
        ({"summed": 2.0, "encoded": 1.5, "fitted": 3.0}, {"encoded": 2.0, "fitted": 1.0}, 60.0),
        ({"compared": 4.0, "probed": 2.0, "scored": 1.0}, {"compared": 1.0, "scored": 3.0}, 7.0),
        ({"weighed": 2.0}, {"weighed": 5.0, "pulled": 7.0}, 2 * (50.0 + 7.0)),
        ({"referred": 4.0, "compared": 2.0}, {"compared": 1.0, "referred": 3.0}, 14.0),
    ],
)
def test_work_inside_of_blocks_counts_for_each_block_and_behind_them_once(does, units, expected):
    part = Passes(4, computed=Computed(**does))
    unit = BlockSeconds(**NOTHING | units)
    assert seconds_of(part, unit, 10.0, Weights.RESIDENT) == pytest.approx(expected)
    assert seconds_of(part, unit, 10.0, Weights.DISK) == pytest.approx(expected)


def test_blocks_come_while_others_compute():
    part = Passes(4, computed=Computed(forwards=3.0))
    slow = BlockSeconds(**NOTHING | {"forward": 2.0, "brought": 5.0})
    assert seconds_of(part, slow, 10.0, Weights.DISK) == pytest.approx(4 * 50.0)
    assert seconds_of(part, slow, 10.0, Weights.RESIDENT) == pytest.approx(60.0)
    usual = Passes(9, is_most=True, usual=2, computed=Computed(forwards=3.0))
    assert seconds_of(usual, slow, 10.0, Weights.DISK) == pytest.approx(2 * 50.0)
