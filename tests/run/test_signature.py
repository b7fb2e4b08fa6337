"""What makes two searches the same: runs of earlier versions go on, others are told apart."""

from types import SimpleNamespace

import pytest

from autoquant.plan.space_file import parse_space
from autoquant.run import signature
from autoquant.run.config import ProbeConfig, SearchConfig

SPACE = """
schema_version: 1
name: experts-only
rules: [{match: experts, formats: [nvfp4/max, nvfp4/mse, nvfp4/four_over_six, fp8, bf16]}]
"""

PROBED = {
    "input_headroom": 1,
    "space": "experts-only",
    "kv_cache": "fp8",
    "calibration_tokens": 64,
    "search_tokens": 96,
    "sequence_length": 32,
    "batch_tokens": 256,
    "calibrate_all_experts": True,
    "seed": 3,
}
SEARCHED = {
    **PROBED,
    "budget_bpe": 4.75,
    "budget_scope": "searched",
    "cost": "active-bytes",
    "layout": "compressed-tensors",
    "report_tokens": 128,
    "trials": 12,
    "max_tokens": 1000,
}


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(signature, "NUMERICS_VERSION", 3)
    source = SimpleNamespace(digest="sha256:ab", model="org/My-Model")
    return SimpleNamespace(source=source, space=parse_space(SPACE, "space.yaml"), groups=())


def test_run_directories_of_earlier_versions_are_found_again(plan):
    """Names as 0.1.0 gave them; their end is a digest of the whole signature."""
    plain = SearchConfig.of({"budget_bpe": 5, "input_headroom": 1})
    assert signature.search_name(plain, plan) == "My-Model-5bpe-b6d17603"
    assert (
        signature.probe_name(ProbeConfig.of({"input_headroom": 1}), plan)
        == "My-Model-probes-f5b71b7a"
    )
    assert signature.search_name(SearchConfig.of(SEARCHED), plan) == "My-Model-4.75bpe-fd8ba156"
    assert signature.probe_name(ProbeConfig.of(PROBED), plan) == "My-Model-probes-1e81468d"


def test_a_search_takes_over_probes_of_the_same_settings(plan):
    search = SearchConfig.of(SEARCHED)
    of_search = signature.search_signature(search, plan)
    of_probes = signature.probe_signature(ProbeConfig.of(PROBED), plan)
    assert signature.probe_part(of_search) == of_probes == signature.probe_part(of_probes)
    assert signature.probe_name(search, plan) == "My-Model-probes-1e81468d"


@pytest.mark.parametrize(
    ("setting", "is_other"),
    [
        ({"device": "cuda"}, False),
        ({"max_seconds": 5}, False),
        ({"mlflow": False}, False),
        ({"export": False}, False),
        ({"report_tokens": 64}, True),
        ({"activation_mode": "w4a16"}, True),
        ({"target": "ampere"}, True),
        ({"target": "blackwell"}, False),
        ({"input_headroom": 1}, True),
        ({"max_tokens": 9}, True),
        ({"budget_bpe": 5.0000001}, True),
    ],
)
def test_what_changes_the_outcome_makes_another_search(plan, setting, is_other):
    one = signature.search_signature(SearchConfig.of({"budget_bpe": 5}), plan)
    other = signature.search_signature(SearchConfig.of({"budget_bpe": 5} | setting), plan)
    assert (one != other) is is_other


def test_budgets_that_agree_in_six_digits_have_folders_of_their_own():
    searches = SearchConfig.of({"budget_bpe": "5.0000001,5.0000002,5.0"}).of_each_budget()
    names = [signature.budget_name(search) for search in searches]
    assert names == ["5.0000001bpe", "5.0000002bpe", "5bpe"]
