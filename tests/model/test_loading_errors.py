"""Models that cannot be measured, each with what is said about it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from searchable import save_searchable

from autoquant.errors import ConfigError, OutOfMemory, SourceError
from autoquant.model.binding import Names, bind
from autoquant.model.loading import choose_device, load_model
from autoquant.plan.linears import LayerGroup, Linear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_searchable("llama", tmp_path_factory.mktemp("llama") / "source")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "source")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weight(folder, name, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})


def refused(folder):
    with pytest.raises(SourceError) as caught:
        load_model(folder, CPU)
    assert "\n" not in caught.value.message
    assert caught.value.fix
    return caught.value.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    def spoil(tensors, name):
        tensors[name][3, 5] = value

    change_weight(folder, "model.layers.1.mlp.up_proj.weight", spoil)
    assert "model.layers.1.mlp.up_proj.weight holds NaN or Inf" in refused(folder)


def test_a_missing_weight_is_named(folder):
    change_weight(folder, "model.layers.1.mlp.up_proj.weight", lambda tensors, n: tensors.pop(n))
    assert "1 weights of the architecture" in refused(folder)
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_weights_of_another_shape_are_refused(folder):
    change_config(folder, intermediate_size=128)
    assert str(folder) in refused(folder)


def test_an_unknown_architecture_is_named(folder):
    change_config(folder, model_type="no_such_model", architectures=["NoSuchModel"])
    assert "no_such_model" in refused(folder)


def test_a_config_that_makes_no_sense_is_refused(folder):
    change_config(folder, num_attention_heads="many")
    assert "transformers cannot load" in refused(folder)


def test_a_model_without_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "no tokenizer" in refused(folder)


def test_a_tokenizer_without_its_config_is_read(folder):
    (folder / "tokenizer_config.json").unlink()
    assert load_model(folder, CPU).tokenizer("ab")["input_ids"]


def test_the_longest_sequence_is_that_of_the_positions(folder):
    assert load_model(folder, CPU).max_length == 64


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_a_model_that_does_not_fit_is_out_of_memory(folder, monkeypatch, error):
    from transformers import LlamaForCausalLM

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(OutOfMemory, match="does not fit the memory of cpu"):
        load_model(folder, CPU)


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=f"device '{name}' cannot be used"):
        choose_device(name)


def test_a_linear_that_is_no_linear_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(SourceError, match=r"transformer\.h\.0\.mlp\.c_fc is a Conv1D"):
        bind(Names(model), group_of("transformer.h.0.mlp.c_fc", 128, 32))


def test_a_linear_without_module_is_named(saved):
    model = load_model(saved, CPU).model
    with pytest.raises(SourceError, match=r"no module in memory carries .*mlp\.extra_proj"):
        bind(Names(model), group_of("model.layers.0.mlp.extra_proj", 96, 64))


def test_a_linear_of_another_shape_is_named(saved):
    model = load_model(saved, CPU).model
    with pytest.raises(
        SourceError, match=r"up_proj is \(64, 96\) on disk and \(96, 64\) in memory"
    ):
        bind(Names(model), group_of("model.layers.0.mlp.up_proj", 64, 96))


def group_of(name, out_features, in_features):
    linear = Linear(
        name=name,
        out_features=out_features,
        in_features=in_features,
        weight_scale_set=name,
        input_scale_set=name,
    )
    return LayerGroup(name=name, role="other", layer=0, linears=(linear,))


class Grouped(torch.nn.Linear):
    """Multiplies halves of its input by halves of its rows, as DeepSeek-V4 does."""

    def forward(self, x):
        halves = self.weight.view(2, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 2, x.shape[-1]).transpose(0, 1), halves)


class Checked(torch.nn.Linear):
    """Another forward of the same product."""

    def forward(self, x):
        return x @ self.weight.t() + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize(("kind", "fits"), [(Grouped, False), (Checked, True)])
def test_a_linear_that_multiplies_otherwise_is_named(saved, kind, fits):
    model = load_model(saved, CPU).model
    mlp = model.model.layers[0].mlp
    mlp.up_proj.__class__ = kind
    names, group = Names(model), group_of("model.layers.0.mlp.up_proj", 96, 64)
    if fits:
        assert bind(names, group)[0].module is mlp.up_proj
        return
    with pytest.raises(SourceError, match="up_proj is a Grouped, which multiplies otherwise"):
        bind(names, group)
