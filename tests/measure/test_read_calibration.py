"""A calibration on disk: what is needed is asked for, and what is no range is refused."""

import json

import pytest

from autoquant.errors import SourceError
from autoquant.measure.calibration import Calibration, read_calibration
from autoquant.plan.kv_cache import KvRange
from autoquant.plan.linears import LayerGroup, Linear

ATTENTION = "model.layers.0.self_attn"


def group_of(*names):
    linears = tuple(
        Linear(
            name=name, out_features=32, in_features=32, weight_scale_set=name, input_scale_set=name
        )
        for name in names
    )
    return LayerGroup(name="all", role="other", layer=0, linears=linears)


@pytest.fixture
def stored(tmp_path):
    file = tmp_path / "calibration.json"

    def stored(**content):
        file.write_text(json.dumps({"schema_version": 1} | content))
        return file

    return stored


def test_what_people_write_by_hand_needs_no_more_than_ranges(stored):
    found = read_calibration(stored(input_amax={"a": 3.0, "b": 1}), [group_of("a", "b")], ())
    assert found == Calibration(
        input_amax={"a": 3.0, "b": 1}, unseen=(), tokens=0, expert_tokens={}
    )
    assert (found.all_experts, found.headroom, found.small_blocks) == (False, 1.0, {})
    assert found.ranges() == {"a": 3.0, "b": 1.0}


@pytest.mark.parametrize("input_amax", [None, [], {"a": 3.0}, {"a": 3.0, "b": None}])
def test_every_input_of_every_group_needs_a_range(stored, input_amax):
    with pytest.raises(SourceError, match="input range"):
        read_calibration(stored(input_amax=input_amax), [group_of("a"), group_of("a", "b")], ())


def test_a_file_that_is_not_there_holds_no_ranges(tmp_path):
    with pytest.raises(SourceError, match="holds no input ranges"):
        read_calibration(tmp_path / "calibration.json", (), ())


@pytest.mark.parametrize("kv_amax", [None, {}, {ATTENTION: 1.0}, {ATTENTION: [1.0, "2"]}])
def test_keys_and_values_need_a_pair_of_ranges(stored, kv_amax):
    with pytest.raises(SourceError, match=f"no range for the keys and values of {ATTENTION}"):
        read_calibration(stored(input_amax={}, kv_amax=kv_amax), (), [ATTENTION])


def test_ranges_of_other_attention_are_left_out(stored):
    file = stored(input_amax={}, kv_amax={ATTENTION: [1.0, 2], "other": [3.0, 4.0]})
    found = read_calibration(file, (), [ATTENTION])
    assert found.kv_ranges == {ATTENTION: KvRange(1.0, 2)}
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert read_calibration(file, (), ()).to_dict().get("kv_amax") is None


@pytest.mark.parametrize("headroom", [1, 1.0, 2.5])
def test_a_headroom_from_one_up_is_read(stored, headroom):
    file = stored(input_amax={"a": 3.0}, headroom=headroom, small_blocks={"a": 0.5})
    assert read_calibration(file, [group_of("a")], ()).ranges() == {"a": headroom * 3.0}


@pytest.mark.parametrize(
    "change",
    [
        {"headroom": 0.5},
        {"headroom": "2"},
        {"headroom": float("inf")},
        {"headroom": float("nan")},
        {"small_blocks": [1]},
        {"small_blocks": {"a": -1}},
        {"small_blocks": {"a": 0}},
        {"small_blocks": {"a": 1.0, "b": "1"}},
    ],
)
def test_a_headroom_that_is_none_is_refused(stored, change):
    with pytest.raises(SourceError):
        read_calibration(stored(input_amax={"a": 1.0}, **change), (), ())


def test_coverage_asks_for_more_tokens_only_where_an_expert_is_short():
    def needed(*tokens):
        found = Calibration(
            input_amax={}, unseen=(), tokens=1000, expert_tokens={"layer": list(tokens)}
        )
        return found.coverage().needed

    assert needed(128, 500) is None
    assert needed(127, 500) == 1008
    assert needed(0, 0) is None
    assert needed(0, 500) == 256
