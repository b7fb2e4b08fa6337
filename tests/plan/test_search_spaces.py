"""Search spaces: the rules, the YAML edge, and the spaces that AutoQuant ships."""

from pathlib import Path

import pytest
from tiny_models import save_model

from autoquant.errors import ConfigError
from autoquant.formats import BF16, FP8, NVFP4, PLAIN_RULES, Choice, ScaleRule
from autoquant.plan.grouping import Groups, find_groups, group_tensors
from autoquant.plan.space import SearchSpace
from autoquant.plan.space_file import load_space, parse_space, schema, shipped_names
from autoquant.source.headers import TensorHeader
from autoquant.source.source import open_source

EVERY = (*(Choice(NVFP4.format, rule) for rule in PLAIN_RULES), FP8, BF16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Groups:
    return find_groups(open_source(save_model("llama", tmp_path_factory.mktemp("dense"))))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory) -> Groups:
    return find_groups(open_source(save_model("minimax_m2", tmp_path_factory.mktemp("sparse"))))


def space(*rules: str, **settings: str) -> SearchSpace:
    head = "".join(f"{name}: {value}\n" for name, value in settings.items())
    body = "".join(f"  - {rule}\n" for rule in rules)
    return parse_space(f"schema_version: 1\nname: mine\n{head}rules:\n{body}", "mine.yaml")


def test_shipped_spaces_load_under_their_names():
    assert set(shipped_names()) == {"default", "experts-only", "attention-bf16"}
    for name in shipped_names():
        assert load_space(name).name == name
        assert load_space(name).description


def test_default_opens_every_linear_but_the_head(dense):
    options = load_space("default").options(dense)
    assert options.open == tuple(group.name for group in dense if group.role != "head")
    assert all(options.choices[name] == EVERY for name in options.open)
    assert options.choices["lm_head"] == (BF16,)
    assert "sensitive" in options.closed["lm_head"][FP8.format]
    assert options.warnings == ()


def test_experts_only_opens_routed_experts(sparse):
    options = load_space("experts-only").options(sparse)
    assert all(name.endswith("block_sparse_moe.experts") for name in options.open)
    assert len(options.open) == 2
    closed = options.closed["model.layers.0.self_attn.qkv"]
    assert closed.keys() == {NVFP4.format, FP8.format}


def test_experts_only_warns_on_a_dense_model(dense):
    (warning,) = load_space("experts-only").options(dense).warnings
    assert "rules[0] (experts) has no effect" in warning


def test_attention_bf16_opens_what_is_no_attention(dense, sparse):
    for groups in (dense, sparse):
        options = load_space("attention-bf16").options(groups)
        assert options.open
        assert all("self_attn" not in name for name in options.open)
        assert options.warnings == ()


def test_the_first_rule_that_matches_decides(dense):
    options = space(
        "{match: model.layers.0.*, formats: [bf16], reason: first layer}",
        "{match: [qkv, o], formats: [fp8, bf16]}",
        "{match: '*', formats: [nvfp4/mse]}",
    ).options(dense)
    assert options.choices["model.layers.0.self_attn.qkv"] == (BF16,)
    assert options.closed["model.layers.0.self_attn.qkv"][FP8.format] == "first layer"
    assert options.choices["model.layers.1.self_attn.qkv"] == (FP8, BF16)
    mse = Choice(NVFP4.format, ScaleRule.MSE)
    assert options.choices["model.layers.1.mlp.gate_up"] == (mse,)
    assert options.choices["lm_head"] == (mse,)


def test_group_that_no_rule_names_stays_bf16(dense):
    options = space("{match: qkv, formats: [fp8]}").options(dense)
    assert options.choices["model.layers.0.mlp.gate_up"] == (BF16,)
    reason = options.closed["model.layers.0.mlp.gate_up"][FP8.format]
    assert reason == "no rule of the space mine names the group"


@pytest.mark.parametrize(
    ("pattern", "opens"),
    [
        ('"*"', False),
        ('"model.layers.0.*"', False),
        ("other", False),
        ("unknown", True),
        ('"*.odd_proj"', True),
        ("model.layers.0.mlp.odd_proj", True),
    ],
)
def test_what_nothing_knows_is_opened_by_its_role_or_its_name_alone(pattern, opens):
    shapes = {"model.layers.0.mlp.odd_proj.weight": (16, 16), "lm_head.weight": (16, 16)}
    tensors = {
        name: TensorHeader(name=name, dtype="BF16", shape=shape, file=Path("x"), begin=0, end=512)
        for name, shape in shapes.items()
    }
    groups = group_tensors(tensors, {}, {})
    options = space(f"{{match: {pattern}, formats: [fp8, bf16]}}").options(groups)
    assert options.choices["model.layers.0.mlp.odd_proj"] == ((FP8, BF16) if opens else (BF16,))
    if not opens:
        reason = options.closed["model.layers.0.mlp.odd_proj"][FP8.format]
        assert reason.startswith("no engine's table and no rule knows this linear")


def test_a_group_of_two_choices_is_open_and_one_of_one_is_not(dense):
    options = space("{match: qkv, formats: [fp8, bf16]}", "{match: o, formats: [fp8]}").options(
        dense
    )
    assert options.open == tuple(group.name for group in dense if group.role == "qkv")


def test_choices_come_cheapest_first_and_once(dense):
    options = space(
        "{match: '*', formats: [bf16, fp8, nvfp4, nvfp4/max]}", scale_rules="[max]"
    ).options(dense)
    assert set(options.choices.values()) == {(NVFP4, FP8, BF16)}


def test_shape_that_forbids_nvfp4_is_said_even_where_the_space_opens_it(tmp_path):
    model = save_model("llama", tmp_path, intermediate_size=72)
    options = load_space("default").options(find_groups(open_source(model)))
    name = "model.layers.0.mlp.down_proj"
    assert options.choices[name] == (FP8, BF16)
    assert "divisible by 16, and K is 72" in options.closed[name][NVFP4.format]


def test_group_whose_only_open_format_is_illegal_stays_bf16(tmp_path):
    model = save_model("llama", tmp_path, intermediate_size=72)
    options = space("{match: down, formats: [nvfp4]}").options(find_groups(open_source(model)))
    name = "model.layers.0.mlp.down_proj"
    assert options.choices[name] == (BF16,)
    assert BF16.format not in options.closed[name]


@pytest.mark.parametrize("pattern", ["model.layer.0.*", "'*.q_proj'", "experts"])
def test_rule_that_matches_nothing_warns(dense, pattern):
    options = space(f"{{match: {pattern}, formats: [fp8, bf16]}}").options(dense)
    assert len(options.warnings) == 1


def test_glob_that_protects_nothing_warns_and_a_role_does_not(dense):
    rules = "{match: model.layer.0.*, formats: [bf16]}", "{match: experts, formats: [bf16]}"
    (warning,) = space(*rules).options(dense).warnings
    assert "rules[0]" in warning


@pytest.mark.parametrize(
    ("rule", "message", "fix"),
    [
        ("{match: expert, formats: [fp8]}", r"rules\[0\]\.match\[0\] is 'expert'", "'experts'"),
        ("{match: [qkv, 3], formats: [fp8]}", r"rules\[0\]\.match\[1\] is 3", "correct"),
        ("{match: qkv, formats: [fp9]}", r"rules\[0\]\.formats\[0\] is 'fp9'", "'fp8'"),
        ("{match: qkv, formats: [nvfp4/mss]}", r"is 'nvfp4/mss': not a format", "'nvfp4/mse'"),
        ("{match: qkv, formats: [fp8/hessian]}", r"fp8\[/cast\]\[/nearest\|gptq\], bf16", "mean"),
        ("{match: qkv, formats: [fp8/neares]}", "not a format", "'fp8/nearest'"),
        ("{match: qkv, formats: [gptq]}", "is 'gptq': not a format", "'fp8/gptq'"),
        (
            "{match: qkv, formats: [fp8/refit]}",
            "belong to one assignment: --effort max",
            "fp8/gptq",
        ),
        ("{match: qkv, formats: []}", r"rules\[0\]\.formats is \[\]", "correct"),
        ("{match: [], formats: [fp8]}", r"rules\[0\]\.match is \[\]", "correct"),
        ("{match: qkv, formts: [fp8]}", r"rules\[0\]\.formats is missing", "add it"),
        ("{match: qkv, formats: [fp8], reson: x}", r"reson is not a setting", "'reason'"),
        ("qkv", r"rules\[0\] is 'qkv'", ""),
    ],
)
def test_wrong_rule_is_located_with_its_value_and_the_nearest_spelling(rule, message, fix):
    with pytest.raises(ConfigError, match=message) as caught:
        space(rule)
    assert caught.value.message.startswith("mine.yaml: ")
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("name", "value", "message", "fix"),
    [
        ("scale_rules", "[]", r"scale_rules is \[\]", "correct"),
        ("roundings", "[]", r"roundings is \[\]", "correct"),
        ("scale_rules", "[msee]", r"scale_rules\[0\] is 'msee'", "'mse'"),
        ("shared_experts", "apart", "shared_experts is 'apart'", "correct"),
        ("shared_expert", "separate", "shared_expert is not a setting", "'shared_experts'"),
    ],
)
def test_wrong_setting_is_located(name, value, message, fix):
    with pytest.raises(ConfigError, match=message) as caught:
        space("{match: qkv, formats: [fp8]}", **{name: value})
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("[1]", "is not a mapping"),
        ("", "is not a mapping"),
        ("schema_version: 2\nname: x\nrules: []", "schema_version is 2"),
        ("name: x\nrules: [{match: qkv, formats: [fp8]}]", "schema_version is missing"),
        ("schema_version: 1\nname: x", "rules is missing"),
        ("schema_version: 1\nname: ''\nrules: [{match: qkv, formats: [fp8]}]", "name is ''"),
        ("schema_version: 1\nname: x\nrules: []", r"rules is \[\]"),
    ],
)
def test_file_that_is_no_search_space(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_space(text, "mine.yaml")


def test_unknown_space_names_the_nearest():
    with pytest.raises(ConfigError, match="no search space 'defualt'") as caught:
        load_space("defualt")
    assert "'default'" in caught.value.fix


def test_file_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_space(tmp_path / "absent.yaml")


def test_file_of_ones_own_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("schema_version: 1\nname: mine\nrules: [{match: o, formats: [fp8]}]\n")
    assert load_space(path).name == load_space(str(path)).name == "mine"


def test_schema_lets_match_be_a_name_or_a_list():
    match = schema()["$defs"]["RuleFile"]["properties"]["match"]
    assert {option["type"] for option in match["anyOf"]} == {"string", "array"}
