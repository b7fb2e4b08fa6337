"""Sizes of assignments, to the byte."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import save_model

from autoquant.export.export import export
from autoquant.formats import BF16, FP8, NVFP4, PLAIN_RULES, Choice
from autoquant.plan.accounting import Accounting
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from autoquant.plan.grouping import find_groups
from autoquant.plan.space_file import load_space, parse_space
from autoquant.source.shards import read_checkpoint_headers
from autoquant.source.source import Source, open_source

CHOICES = (*(Choice(NVFP4.format, rule) for rule in PLAIN_RULES), FP8, BF16)


def accounting_of(source: Source, space: str = "default") -> Accounting:
    loaded = load_space(space)
    groups = find_groups(source, shared_experts=loaded.shared_experts)
    choices = loaded.options(groups).choices
    return Accounting(headers=source.headers, groups=groups, choices=choices)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        kind: save_model(kind, folder / kind, num_hidden_layers=1, **changes)
        for kind, changes in {
            "llama": {},
            "qwen2_moe": {},
            "minimax_m2": {"num_local_experts": 2},
        }.items()
    }
    made["float32"] = save_model("llama", folder / "float32", dtype="float32", num_hidden_layers=1)
    return {kind: open_source(path) for kind, path in made.items()}


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_predicted_bytes_are_those_of_the_exported_headers(sources, tmp_path_factory, data):
    source = sources[data.draw(st.sampled_from(sorted(sources)))]
    accounting = accounting_of(source)
    groups = accounting.groups
    assignment = Assignment.of(
        {group.name: data.draw(st.sampled_from(CHOICES)) for group in groups}
    )
    target = tmp_path_factory.mktemp("out") / "checkpoint"
    amax = {linear.input_scale_set: 1.0 for linear in groups.linears}
    result = export(source, groups, assignment, amax, target)
    stored = read_checkpoint_headers(target).bytes
    assert accounting.checkpoint_bytes(assignment) == stored == result.checkpoint_bytes
    assert accounting.bpe(assignment) == 8 * stored / source.headers.elements == result.bpe


@given(st.data())
def test_floor_and_ceiling_hold_every_legal_assignment(sources, data):
    accounting = accounting_of(sources[data.draw(st.sampled_from(sorted(sources)))])
    assignment = Assignment.of(
        {name: data.draw(st.sampled_from(own)) for name, own in accounting.choices.items()}
    )
    for scope in Scope:
        low, own, high = (
            accounting.bpe(a, scope) for a in (accounting.floor, assignment, accounting.ceiling)
        )
        assert low <= own <= high


def test_untouched_bf16_source_has_16_bits_and_searched_scope_counts_what_is_open(sources):
    accounting = accounting_of(sources["llama"])
    assert accounting.bpe(Assignment.of({})) == 16.0
    assert accounting.bpe(Assignment.of({}), Scope.SEARCHED) == 16.0
    assert "lm_head" not in accounting.searched
    searched = accounting.bpe(accounting.floor, Scope.SEARCHED)
    assert 4.5 < searched < 4.52
    assert accounting.bpe(accounting.floor) > searched


def test_groups_of_a_float32_source_that_stay_take_16_bits(sources):
    accounting = accounting_of(sources["float32"])
    assert accounting.bpe(Assignment.of({})) == 16.0
    assert accounting.ceiling == Assignment.of(dict.fromkeys(accounting.choices, BF16))


def test_a_space_that_opens_nothing_has_no_searched_bits(sources):
    accounting = accounting_of(sources["llama"], "experts-only")
    assert accounting.bpe(accounting.floor, Scope.SEARCHED) == 0.0
    assert accounting.bpe(accounting.floor) == 16.0


def test_illegal_nvfp4_leaves_fp8_as_the_floor(tmp_path):
    source = open_source(save_model("llama", tmp_path, intermediate_size=72))
    accounting = accounting_of(source)
    formats = {name: accounting.floor[name].format for name in accounting.searched}
    assert formats["model.layers.0.mlp.down_proj"] is FP8.format
    assert formats["model.layers.0.mlp.gate_up"] is NVFP4.format


def test_a_group_with_one_choice_is_not_searched(sources):
    space = parse_space(
        "schema_version: 1\nname: one\nrules:\n  - {match: qkv, formats: [nvfp4/max]}\n", "one"
    )
    source = sources["llama"]
    groups = find_groups(source)
    choices = space.options(groups).choices
    accounting = Accounting(headers=source.headers, groups=groups, choices=choices)
    assert accounting.searched == frozenset()
    assert accounting.floor["model.layers.0.self_attn.qkv"] == NVFP4
