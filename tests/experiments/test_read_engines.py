"""What is read from an engine's sources, here of an engine of a few lines."""

import json
import zipfile
from pathlib import Path

import pytest

from experiments.engine_tables.engines import sglang_architectures, vllm_architectures
from experiments.engine_tables.make import as_text, tables
from experiments.engine_tables.report import changes
from experiments.engine_tables.sources import Wheel
from experiments.engine_tables.tables import table_of

LINEAR = """
from torch import nn
class LinearBase(nn.Module):
    def __init__(self, rows, columns, quant_config=None, *, prefix=""):
        self.quant_config = quant_config
class ColumnParallelLinear(LinearBase):
    def __init__(self, rows, columns, bias=True, quant_config=None, prefix=""):
        super().__init__(rows, columns, quant_config, prefix=prefix)
class GateLinear(ColumnParallelLinear):
    def __init__(self, rows, columns, **kwargs):
        super().__init__(rows, columns, quant_config=None, **kwargs)
class FusedMoE(nn.Module):
    pass
"""
MODEL = """
from torch import nn
from toy.layers.linear import ColumnParallelLinear as Linear, FusedMoE, GateLinear
from .utils import make_layers
STACKED = [
    (".qkv_proj", ".q_proj", "q"), (".qkv_proj", ".k_proj", "k"), (".qkv_proj", ".v_proj", "v"),
]
class Attention(nn.Module):
    def __init__(self, config, vllm_config, prefix=""):
        quant_config = vllm_config.quant_config
        self.qkv_proj = Linear(8, 24, quant_config=quant_config)
        self.o_proj = Linear(8, 8, False, quant_config)
        self.g_proj = Linear(8, 8) if config.gated else None
class Unquantized(Attention):
    def __init__(self, config, vllm_config, prefix=""):
        saved = vllm_config.quant_config
        try:
            vllm_config.quant_config = None
            super().__init__(config, vllm_config)
        finally:
            vllm_config.quant_config = saved
class MLP(nn.Module):
    def __init__(self, quant_config, **kwargs):
        options = dict(quant_config=quant_config)
        self.gate_up_proj = Linear(8, 32, **options)
        self.down_proj = Linear(16, 8, quant_config=quant_config, **kwargs)
        self.conv1d = Linear(4, 8)
class Sparse(nn.Module):
    def __init__(self, quant_config):
        self.gate = GateLinear(8, 4)
        self.experts = FusedMoE(quant_config=quant_config)
class Layer(nn.Module):
    attention = Attention
    def __init__(self, config, vllm_config, prefix=""):
        kind = {"linear": Unquantized}[config.kind]
        if config.linear:
            self.linear_attn = kind(config, vllm_config)
        else:
            self.attn = self.attention(config, vllm_config=vllm_config)
        if config.sparse:
            self.mlp = Sparse(vllm_config.quant_config)
        else:
            self.mlp = MLP(quant_config=vllm_config.quant_config)
class Model(nn.Module):
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    mapper = Mapper(orig_to_new_substr={".self_attn.": ".attn.", ".gone.": ".nowhere."})
    def __init__(self, *, vllm_config, layer_type=Layer, prefix=""):
        self.start, self.end, self.layers = make_layers(
            vllm_config.depth, lambda prefix: layer_type(vllm_config.config, vllm_config, prefix)
        )
    def load_weights(self, weights):
        for name, weight, shard in STACKED:
            pass
class ToyForCausalLM(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        self.model = Model(vllm_config=vllm_config, prefix=prefix)
        self.vision_tower = Model(vllm_config=vllm_config)
class SameForCausalLM(ToyForCausalLM):
    pass
class BareForCausalLM(nn.Module):
    pass
EntryClass = [ToyForCausalLM, SameForCausalLM, BareForCausalLM]
"""
REGISTRY = """
_TEXT_GENERATION_MODELS = {"ToyForCausalLM": ("toy", "ToyForCausalLM")}
_MULTIMODAL_MODELS = {
    "SameForCausalLM": ("toy", "SameForCausalLM"), "BareForCausalLM": ("toy", "BareForCausalLM")
}
_TRANSFORMERS_SUPPORTED_MODELS = {"LentForCausalLM": ("transformers", "TransformersForCausalLM")}
"""
UTILS = "def make_layers(number, make, prefix=''):\n    return 0, number, [make(prefix)]\n"
AUTO = """
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict([("toy", "ToyForCausalLM"), ("other", "Other")])
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = OrderedDict(
    [("toy", "NotThis"), ("same", "SameForCausalLM")]
)
"""
TOY = {
    "joined": {
        "attn.qkv_proj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "linear_attn.qkv_proj": [f"linear_attn.{p}_proj" for p in "qkv"],
        "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    },
    "alone": [
        *("attn.g_proj", "attn.o_proj", "linear_attn.g_proj", "linear_attn.o_proj"),
        *("mlp.down_proj", "mlp.gate"),
    ],
    "experts": ["mlp.experts"],
    "unquantized": [
        *("attn.g_proj", "linear_attn.g_proj", "linear_attn.o_proj", "linear_attn.qkv_proj"),
        "mlp.gate",
    ],
    "renamed": {".self_attn.": ".attn."},
}


def wheel(folder: Path, package: str, files: dict[str, str]) -> Wheel:
    path = folder / f"{package}-1.2.3-py3-none-any.whl"
    files = {"toy/layers/linear.py": LINEAR, **files}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return Wheel(path)


@pytest.fixture
def vllm(tmp_path):
    models = "vllm/model_executor/models"
    files = {"registry.py": REGISTRY, "toy.py": MODEL, "utils.py": UTILS}
    return wheel(tmp_path, "vllm", {f"{models}/{name}": text for name, text in files.items()})


@pytest.fixture
def sglang(tmp_path):
    models = "sglang/srt/models"
    return wheel(tmp_path, "sglang", {f"{models}/toy.py": MODEL, f"{models}/utils.py": UTILS})


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_model_is_read_from_its_constructors_and_its_names(engine, request):
    own = request.getfixturevalue(engine)
    find = {"vllm": vllm_architectures, "sglang": sglang_architectures}[engine]
    kinds = find(own)
    assert list(kinds) == ["ToyForCausalLM", "SameForCausalLM", "BareForCausalLM"]
    assert table_of(own, kinds["ToyForCausalLM"], kinds) == TOY


def test_the_file_holds_each_table_once_and_says_what_changed(vllm, sglang, tmp_path):
    auto = {"transformers/models/auto/modeling_auto.py": AUTO}
    wheels = {"vllm": vllm, "sglang": sglang, "transformers": wheel(tmp_path, "transformers", auto)}
    made = tables(wheels)
    assert made["model_types"] == {"same": "SameForCausalLM", "toy": "ToyForCausalLM"}
    once = {"SameForCausalLM": TOY, "ToyForCausalLM": "SameForCausalLM"}
    assert [engine["architectures"] for engine in made["engines"].values()] == [once, once]
    bare = {name: engine["without_table"] for name, engine in made["engines"].items()}
    assert bare == {"vLLM": ["BareForCausalLM", "LentForCausalLM"], "SGLang": ["BareForCausalLM"]}
    assert json.loads(as_text(made)) == made
    assert list(changes(made, made)) == []
    before = json.loads(as_text(made))
    before["engines"]["vLLM"]["version"] = "1.2.2"
    table = before["engines"]["vLLM"]["architectures"]["SameForCausalLM"]
    table["unquantized"].remove("mlp.gate")
    table["joined"]["attn.qkv_proj"] = ["attn.q_proj", "attn.k_proj"]
    del before["engines"]["SGLang"]["architectures"]["ToyForCausalLM"]
    before["engines"]["SGLang"]["without_table"] = ["GoneForCausalLM"]
    both = ("SameForCausalLM", "ToyForCausalLM")
    joined = "attn.q_proj, attn.k_proj"
    assert list(changes(before, made)) == [
        "vLLM: 1.2.2 -> 1.2.3",
        *(
            f"vLLM, {name}: {line}"
            for name in both
            for line in (
                f"joined attn.qkv_proj: {joined} -> {joined}, attn.v_proj",
                "unquantized: + mlp.gate",
            )
        ),
        "SGLang: new architecture ToyForCausalLM",
        "SGLang: + BareForCausalLM, without a table",
        "SGLang: - GoneForCausalLM, without a table",
    ]
