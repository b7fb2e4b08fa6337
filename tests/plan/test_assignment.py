"""Assignments as files hold them, the names that they have, and what a model refuses."""

import hashlib
import json

import pytest
from tiny_models import save_model

from autoquant.errors import ConfigError
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment, require_legal
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

MSE, A16 = Choice.parse("nvfp4/mse"), Choice.parse("nvfp4/mse/a16")
STORED = {"schema_version": 1, "groups": {"a": "nvfp4/mse", "b": "bf16"}}


def test_what_earlier_versions_stored_is_read_and_written_again():
    assignment = Assignment.from_dict(STORED)
    assert assignment == Assignment.of({"a": MSE, "b": BF16})
    assert assignment.to_dict() == STORED


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_schema_is_refused(version):
    with pytest.raises(ConfigError, match=f"schema_version {version}, this version reads 1"):
        Assignment.from_dict({**STORED, "schema_version": version})


def test_a_digest_is_that_of_what_is_quantized_whatever_the_order():
    """Run directories of earlier versions are found by it."""
    canonical = json.dumps([["a", "nvfp4/mse"], ["c", "fp8"]])
    expected = hashlib.sha256(canonical.encode()).hexdigest()[0:16]
    assert Assignment.of({"c": FP8, "b": BF16, "a": MSE}).digest == expected
    assert len(expected) == 16


def test_counts_name_every_format_and_bf16_inputs_apart():
    assignment = Assignment.of({"a": MSE, "b": NVFP4, "c": A16, "d": FP8})
    assert assignment.counts() == {"nvfp4": 2, "nvfp4/a16": 1, "fp8": 1, "bf16": 0}


def test_what_a_group_cannot_take_is_refused_with_its_reason(tmp_path):
    groups = find_groups(open_source(save_model("llama", tmp_path, intermediate_size=72)))
    down = "model.layers.1.mlp.down_proj"
    require_legal(Assignment.of({down: FP8, "model.layers.0.mlp.gate_up": NVFP4}), groups)
    with pytest.raises(ConfigError, match=f"puts {down} into nvfp4/max: .* K is 72"):
        require_legal(Assignment.of({down: NVFP4}), groups)
    with pytest.raises(ConfigError, match="no layer group 'none'"):
        require_legal(Assignment.of({"none": FP8}), groups)
