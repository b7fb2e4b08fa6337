"""Inputs left in BF16 for a few layers: no byte more, less KL, and within the share."""

import json

import pytest

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment


def result_of(run):
    return json.loads((run / "result.json").read_text())


@pytest.mark.slow
def test_the_share_is_kept_and_used_and_stored_as_engines_read_it(search, autoquant):
    _, without = search("--no-export", out="without")
    done, run = search("--a16-share", 0.4, out="with")
    plain, result = result_of(without), result_of(run)
    bits, share = result["limits"]
    assert share["cost"] == "a16-products"
    assert 0 < share["taken"] <= 0.4
    assert bits["total"] <= bits["at_most"]
    assert result["kl"]["mean"] < plain["kl"]["mean"]
    inputs = [choice.input for _, choice in Assignment.read(run / "assignment.yaml")]
    assert "a16" in inputs
    assert len(plain["limits"]) == 1
    assert autoquant("verify", run / "checkpoint").exit_code == 0
    assert "multiply-adds with inputs left in BF16" in done.stdout


def test_every_nvfp4_choice_has_one_with_bf16_inputs(autoquant, tmp_path, model):
    def choices(*flags):
        done = autoquant("plan", model, "--format", "json", *flags)
        assert done.exit_code == 0, done.stderr
        groups = json.loads(done.stdout)["groups"]
        return {g["name"]: [Choice.parse(c) for c in g["choices"]] for g in groups}

    plain, opened = choices(), choices("--a16-share", "0.1")
    for name, own in plain.items():
        added = [str(c) for c in opened[name] if c not in own]
        assert added == [f"{c}/a16" for c in own if c.format.name == "nvfp4"]
        bits = [c.format.weight_bits for c in opened[name]]
        assert bits == sorted(bits), "cheapest first, as the screen of the probes takes them"


def test_a_share_is_refused_where_inputs_stay_in_bf16_anyway(search, tmp_path):
    done, _ = search("--a16-share", 0.1, "--activation-mode", "w4a16", code=2)
    assert "the inputs of NVFP4 layers are in BF16 as it is" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_share_and_a_table_are_one_limit_too_many(search, tmp_path):
    table = tmp_path / "costs.yaml"
    table.write_text(
        "schema_version: 1\nunit: us\nscale: 10\nrows:\n"
        + "".join(
            f"  - {{role: '*', shape: '*', choice: {choice}, cost: 1}}\n"
            for choice in ("nvfp4", "nvfp4/a16", "fp8", "bf16")
        )
    )
    flags = ("--cost-table", table, "--cost-limit", 100, "--a16-share", 0.1)
    done, _ = search(*flags, code=2)
    assert "two limits beside the budget" in done.stderr


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_is_between_0_and_1(search, share):
    done, _ = search("--a16-share", share, code=2)
    assert "--a16-share" in done.stderr
