"""Files beside the weights that a server reads: changed and broken ones are named."""

import json
from pathlib import Path

import pytest
from exported import NVFP4_MAX, input_amax, mixed
from searchable import save_tokenizer
from tiny_models import save_model

from autoquant.errors import SourceError
from autoquant.export.export import export
from autoquant.export.layouts.base import Layout
from autoquant.export.verify import verify
from autoquant.formats import FP8
from autoquant.plan.grouping import find_groups
from autoquant.source.source import Source, open_source

Q = "model.layers.0.self_attn.q_proj"
TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "source", vocab_size=272)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    config["time_step_limit"] = [0.0, float("inf")]
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    return open_source(folder)


def exported(source: Source, folder: Path, layout: Layout = Layout.MODELOPT) -> Path:
    groups = find_groups(source)
    assignment = mixed(groups).replace(
        {"model.layers.0.self_attn.qkv": NVFP4_MAX, "model.layers.0.self_attn.o_proj": FP8}
    )
    export(source, groups, assignment, input_amax(groups), folder, layout=layout)
    return folder


@pytest.fixture
def checkpoint(source, tmp_path) -> Path:
    return exported(source, tmp_path / "out")


@pytest.fixture
def compressed(source, tmp_path) -> Path:
    return exported(source, tmp_path / "out", Layout.COMPRESSED_TENSORS)


def change(file: Path, *keys, value=None, remove: bool = False) -> None:
    """Set what a JSON file holds under `keys`."""
    whole = part = json.loads(file.read_text())
    *path, last = keys
    for key in path:
        part = part[key]
    if remove:
        del part[last]
    else:
        part[last] = value
    file.write_text(json.dumps(whole))


def problems(folder: Path, source: Source | None = None) -> list[str]:
    return list(verify(folder, source).problems)


def is_refused(folder: Path) -> bool:
    """Whether something is wrong and no accident happens."""
    try:
        return bool(problems(folder))
    except SourceError:
        return True


def test_an_earlier_versions_declaration_is_a_note(checkpoint):
    """It lacks what engines call joined matrices; anything else that it lacks is a problem."""
    for file, *keys in (
        ("config.json", "quantization_config", "quantized_layers"),
        ("hf_quant_config.json", "quantization", "quantized_layers"),
    ):
        layers = json.loads((checkpoint / file).read_text())
        for key in keys:
            layers = layers[key]
        own = {name: said for name, said in layers.items() if "qkv_proj" not in name}
        own = {name: said for name, said in own.items() if "gate_up_proj" not in name}
        assert len(own) < len(layers)
        change(checkpoint / file, *keys, value=own)
        whole = json.loads((checkpoint / file).read_text())[keys[0]]
        left = whole["ignore" if "ignore" in whole else "exclude_modules"]
        left = [name for name in left if "qkv_proj" not in name and "gate_up_proj" not in name]
        change(
            checkpoint / file,
            keys[0],
            "ignore" if "ignore" in whole else "exclude_modules",
            value=left,
        )
    found = verify(checkpoint)
    assert found.problems == ()
    assert ["SGLang" in note for note in found.notes] == [True]
    change(checkpoint / "config.json", "quantization_config", "quantized_layers", Q, remove=True)
    found = verify(checkpoint)
    assert found.problems
    assert found.notes == ()


@pytest.mark.parametrize("layout", Layout)
def test_an_export_agrees_with_itself_and_keeps_what_json_lacks(source, tmp_path, layout):
    folder = exported(source, tmp_path / "out", layout)
    assert problems(folder) == problems(folder, source) == []
    config = json.loads((folder / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", 1e-3, "rms_norm_eps 0.001, and the source has 1e-06"),
        ("hidden_act", "gelu", 'hidden_act "gelu", and the source has "silu"'),
        ("intermediate_size", 97, "intermediate_size 97, and the source has 96"),
        ("num_attention_heads", True, "num_attention_heads true, and the source has 4"),
        ("time_step_limit", [0.0, None], "time_step_limit [0.0, null], and the source has"),
        ("layer_types", ["sliding_attention", "full_attention"], "layer_types"),
        ("own_key", 1, "own_key 1, and the source has none"),
        ("dtype", "float32", 'dtype "float32", and the source has "bfloat16"'),
    ],
)
def test_a_key_of_the_config_that_is_not_the_sources(checkpoint, source, key, value, said):
    change(checkpoint / "config.json", key, value=value)
    (found,) = problems(checkpoint, source)
    assert found.startswith("config.json has ")
    assert said in found


def test_a_nested_key_of_the_config(checkpoint, source):
    change(checkpoint / "config.json", "rope_parameters", "rope_theta", value=5e5)
    (found,) = problems(checkpoint, source)
    assert "rope_parameters.rope_theta 500000.0, and the source has 10000.0" in found


def test_a_key_that_the_config_has_lost(checkpoint, source):
    change(checkpoint / "config.json", "rms_norm_eps", remove=True)
    assert problems(checkpoint, source) == [
        "config.json has no rms_norm_eps, and the source has 1e-06."
    ]


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", ("quantization_config", "group_size")),
        ("config.json", ("quantization_config", "quantized_layers", Q, "group_size")),
        ("config.json", ("quantization_config", "config_groups", "group_0", "weights", "num_bits")),
        ("hf_quant_config.json", ("quantization", "group_size")),
        ("hf_quant_config.json", ("quantization", "quantized_layers", Q, "group_size")),
        ("hf_quant_config.json", ("producer", "name")),
    ],
)
def test_each_declaration_says_what_is_stored_without_a_source(checkpoint, file, keys):
    change(checkpoint / file, *keys, value=128)
    *_, found = problems(checkpoint)
    assert found.startswith(f"{file} has {'.'.join(keys)} 128, and an export of what is stored has")
    change(checkpoint / file, *keys, remove=True)
    assert f"{file} has no {'.'.join(keys)}" in problems(checkpoint)[-1]


def test_another_version_may_have_written_a_checkpoint(checkpoint):
    places = (
        ("config.json", ("quantization_config", "producer", "autoquant")),
        ("hf_quant_config.json", ("producer", "autoquant")),
    )
    for file, keys in places:
        change(checkpoint / file, *keys, value="0.0.9")
        assert problems(checkpoint) == []
        change(checkpoint / file, *keys, remove=True)
        assert problems(checkpoint) == []


def test_block_sizes_of_compressed_tensors(compressed):
    groups = json.loads((compressed / "config.json").read_text())["quantization_config"]
    name = next(n for n, g in groups["config_groups"].items() if g["weights"]["num_bits"] == 4)
    keys = ("quantization_config", "config_groups", name, "weights", "group_size")
    change(compressed / "config.json", *keys, value=32)
    (found,) = problems(compressed)
    assert f"{name}.weights.group_size 32, and an export of what is stored has 16" in found


def test_a_matrix_that_no_declaration_leaves_out(checkpoint):
    for file, key in (("config.json", "ignore"), ("hf_quant_config.json", "exclude_modules")):
        outer = "quantization_config" if key == "ignore" else "quantization"
        data = json.loads((checkpoint / file).read_text())
        data[outer][key] = [name for name in data[outer][key] if "embed" not in name]
        (checkpoint / file).write_text(json.dumps(data))
    assert problems(checkpoint) == [
        "config.json has no model.embed_tokens in quantization_config.ignore, and an export of "
        "what is stored has it.",
        "hf_quant_config.json has no model.embed_tokens in quantization.exclude_modules, and an "
        "export of what is stored has it.",
    ]


WRONG = [None, 7, "text", [], [1], {}, {"a": 1}, [["x"]]]


@pytest.mark.parametrize("value", WRONG, ids=map(repr, WRONG))
@pytest.mark.parametrize(
    "keys",
    [
        ("quant_algo",),
        ("quantized_layers",),
        ("quantized_layers", Q),
        ("quantized_layers", Q, "quant_algo"),
        ("ignore",),
        ("config_groups",),
        (),
    ],
    ids=".".join,
)
def test_a_declaration_of_any_type_is_named_and_no_accident(checkpoint, keys, value):
    change(checkpoint / "config.json", "quantization_config", *keys, value=value)
    assert is_refused(checkpoint)


@pytest.mark.parametrize("value", WRONG, ids=map(repr, WRONG))
@pytest.mark.parametrize(
    "keys",
    [
        ("config_groups",),
        ("config_groups", "group_0"),
        ("config_groups", "group_0", "weights"),
        ("config_groups", "group_0", "weights", "num_bits"),
        ("config_groups", "group_0", "targets"),
        ("config_groups", "group_0", "input_activations"),
        ("ignore",),
    ],
    ids=".".join,
)
def test_a_declaration_of_the_other_layout_too(compressed, keys, value):
    change(compressed / "config.json", "quantization_config", *keys, value=value)
    assert is_refused(compressed)


@pytest.mark.parametrize("expression", ["re:(a+)+$", "re:(x|x)*y", "re:.*.*.*.*.*z", "re:("])
def test_an_expression_that_never_ends_is_not_tried(compressed, expression):
    keys = ("quantization_config", "config_groups", "group_0", "targets")
    change(compressed / "config.json", *keys, value=[expression])
    assert "the expression" in problems(compressed)[0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bpe", 4.0, "says bpe 4.0, and the tensors have"),
        ("layout", "gguf", "says layout gguf, and the tensors have modelopt"),
        ("kv_cache", "fp8", "says kv_cache fp8, and the tensors have bf16"),
        ("checkpoint_bytes", "many", "says checkpoint_bytes many"),
        ("sha256", "0" * 64, "has a `sha256` that is not a mapping"),
        ("assignment", ["all"], "has no mapping `assignment`"),
        ("source_digest", None, "names another source"),
    ],
)
def test_what_autoquant_json_says_is_what_is_stored(checkpoint, source, key, value, said):
    change(checkpoint / "autoquant.json", key, value=value)
    assert any(said in problem for problem in problems(checkpoint, source))


def test_an_assignment_that_is_not_the_stored_one(checkpoint):
    said = json.loads((checkpoint / "autoquant.json").read_text())
    said["assignment"]["model.layers.0.self_attn.o_proj"] = "bf16"
    said["assignment"]["model.layers.7.mlp.down_proj"] = "fp8"
    said["assignment"]["model.layers.0.self_attn.qkv"] = "int3"
    del said["assignment"]["model.layers.1.self_attn.o_proj"]
    (checkpoint / "autoquant.json").write_text(json.dumps(said))
    found = "\n".join(problems(checkpoint))
    assert "o_proj bf16, and model.layers.0.self_attn.o_proj is fp8" in found
    assert "model.layers.7.mlp.down_proj, which the tensors do not make" in found
    assert f"qkv int3, and {Q} is nvfp4" in found
    assert "says nothing of model.layers.1.self_attn.o_proj" in found


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"],
)
def test_a_companion_that_is_changed_or_missing(checkpoint, source, name):
    file = checkpoint / name
    file.write_text(file.read_text() + " ")
    assert problems(checkpoint) == []
    assert problems(checkpoint, source) == [f"{name} differs from the source's."]
    file.unlink()
    assert problems(checkpoint, source) == [f"{name} of the source is missing."]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", '{"version": "1.0"', "tokenizer.json is not JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json is no tokenizer: "),
        (
            "generation_config.json",
            "[" * 500 + "]" * 500,
            "generation_config.json is nested deeper",
        ),
        ("special_tokens_map.json", "\xff", "special_tokens_map.json is not UTF-8"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja is no chat template: "),
        ("chat_template.jinja", "{% if x %}" * 9_000, "nested too deep"),
        ("chat_template.json", '{"chat_template": "{% for %}"}', "chat_template.json is no chat"),
    ],
)
def test_a_broken_companion_is_named_without_a_source(checkpoint, name, content, said):
    (checkpoint / name).write_text(content, encoding="latin-1")
    (found,) = problems(checkpoint)
    assert said in found


def test_files_that_servers_read_and_the_source_lacks(checkpoint, source):
    (checkpoint / "LICENSE").write_text("free")
    (checkpoint / "added_tokens.json").write_text("{}")
    (checkpoint / "adapter_config.json").write_text("{}")
    (checkpoint / "more.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    assert problems(checkpoint, source) == [
        "more.safetensors is not of the checkpoint, and engines read its tensors too.",
        "adapter_config.json is not in the source, and servers read it.",
        "added_tokens.json is not in the source, and servers read it.",
    ]


def test_a_link_out_of_the_checkpoint_is_named(checkpoint, source, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "elsewhere")
    (found,) = problems(checkpoint, source)
    assert "notes.txt is a link to" in found
