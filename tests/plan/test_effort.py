"""What a plain format of a search space stands for, by the effort and by the space itself."""

import pytest
from tiny_models import save_model

from autoquant.formats import FP8, Choice
from autoquant.plan.grouping import find_groups
from autoquant.plan.space import Effort
from autoquant.plan.space_file import load_space, parse_space, shipped_names
from autoquant.source.source import open_source

PLAIN = {"nvfp4/max", "nvfp4/mse", "nvfp4/four_over_six"}
FITTED = {"nvfp4/mse/gptq", "nvfp4/hessian/gptq"}


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return find_groups(open_source(save_model("llama", tmp_path_factory.mktemp("llama") / "model")))


def nvfp4_of(options):
    """The NVFP4 choices of every group that has any, which all are the same."""
    found = [{str(c) for c in own if "nvfp4" in str(c)} for own in options.choices.values()]
    (common,) = {frozenset(own) for own in found if own}
    return common


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_spaces_leave_it_to_the_effort(groups, name):
    if name == "experts-only":
        pytest.skip("opens nothing of a dense model")
    assert nvfp4_of(load_space(name).options(groups)) == PLAIN
    assert nvfp4_of(load_space(name, Effort.FAST).options(groups)) == PLAIN
    assert nvfp4_of(load_space(name, Effort.DEFAULT).options(groups)) == PLAIN | FITTED


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("scale_rules: [max]", {"nvfp4/max"}),
        ("roundings: [gptq]", {f"{choice}/gptq" for choice in PLAIN}),
        (
            "scale_rules: [mse, diagonal]\nroundings: [nearest, gptq]",
            {"nvfp4/mse", "nvfp4/mse/gptq", "nvfp4/diagonal", "nvfp4/diagonal/gptq"},
        ),
    ],
)
@pytest.mark.parametrize("effort", Effort)
def test_a_space_that_says_it_means_it_under_every_effort(groups, effort, said, expected):
    text = f"schema_version: 1\nname: s\n{said}\nrules: [{{match: '*', formats: [nvfp4, bf16]}}]"
    assert nvfp4_of(parse_space(text, "s.yaml", effort).options(groups)) == expected


@pytest.mark.parametrize(
    ("text", "fast", "default"),
    [
        ("nvfp4", PLAIN, PLAIN | FITTED),
        ("nvfp4/mse", {"nvfp4/mse"}, {"nvfp4/mse", "nvfp4/mse/gptq"}),
        ("nvfp4/mse/nearest", {"nvfp4/mse"}, {"nvfp4/mse"}),
        ("nvfp4/gptq", {f"{choice}/gptq" for choice in PLAIN}, FITTED),
        ("nvfp4/hessian", {"nvfp4/hessian"}, {"nvfp4/hessian/gptq"}),
        ("nvfp4/a16", {f"{c}/a16" for c in PLAIN}, {f"{c}/a16" for c in PLAIN | FITTED}),
        ("nvfp4/max/gptq", {"nvfp4/max/gptq"}, {"nvfp4/max/gptq"}),
        ("fp8", {"fp8"}, {"fp8", "fp8/gptq"}),
        ("fp8/nearest", {"fp8"}, {"fp8"}),
        ("fp8/gptq", {"fp8/gptq"}, {"fp8/gptq"}),
        ("fp8/cast", {"fp8/cast"}, {"fp8/cast"}),
        ("bf16", {"bf16"}, {"bf16"}),
    ],
)
def test_a_rule_says_as_much_as_it_likes(text, fast, default):
    for effort, expected in ((Effort.FAST, fast), (Effort.DEFAULT, default)):
        assert {str(choice) for choice in Choice.parse_all(text, effort.ways)} == expected


def test_what_a_format_lacks_is_left_out():
    assert Choice.parse_all("fp8", [("max", "gptq")]) == [FP8]
    assert Choice.parse_all("nvfp4", [("max", "gptq"), (None, "nearest")]) == [
        Choice.parse("nvfp4/max/gptq")
    ]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("roundings: [gptq]", {"fp8/gptq"}),
        ("roundings: [nearest, gptq]", {"fp8", "fp8/gptq"}),
        ("scale_rules: [hessian]", {"fp8"}),
    ],
)
def test_roundings_of_a_space_are_those_of_fp8_too(groups, said, expected):
    text = f"schema_version: 1\nname: s\n{said}\nrules: [{{match: '*', formats: [fp8, bf16]}}]"
    found = parse_space(text, "s.yaml", Effort.DEFAULT).options(groups).choices.values()
    assert {frozenset(map(str, own)) for own in found if len(own) > 1} == {
        frozenset(expected | {"bf16"})
    }
