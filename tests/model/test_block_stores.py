"""A model whose blocks come and go computes what one in memory computes."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from searchable import save_searchable
from transformers import AutoModelForCausalLM

from autoquant.codes.held import Weights
from autoquant.errors import OutOfMemory, SourceError
from autoquant.model.loading import load_model
from autoquant.model.streaming.blocks import BlockReader
from autoquant.model.streaming.placement import Allowance, Kept, Sizes, choose

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
KINDS = [
    "llama",
    "qwen3",
    "qwen2_moe",
    "minimax_m2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "zamba2",
]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save_searchable(request.param, tmp_path_factory.mktemp(request.param) / "source")


def loaded(folder, weights):
    return load_model(folder, CPU, allowance=Allowance(weights=weights))


@torch.inference_mode()
@pytest.mark.parametrize("weights", [Weights.RESIDENT, Weights.HOST, Weights.DISK])
def test_weights_are_those_that_transformers_loads(folder, weights):
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    found = loaded(folder, weights)
    seen = set()
    for block in range(found.model.config.num_hidden_layers):
        found.store.open(block)
        present = {n: t for n, t in found.model.state_dict().items() if not t.is_meta}
        seen |= present.keys()
        for name, tensor in present.items():
            assert tensor.dtype is expected[name].dtype
            assert torch.equal(tensor, expected[name]), name
        if weights is not Weights.RESIDENT:
            assert any(t.is_meta for t in found.model.state_dict().values())
    assert seen == expected.keys()
    assert not any(b.is_meta for _, b in found.model.named_non_persistent_buffers())


def test_one_block_is_there_at_a_time_and_the_next_is_read_ahead(tmp_path, monkeypatch):
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=4)
    found = loaded(folder, Weights.DISK)
    read, reading = [], BlockReader.read

    def counted(reader, block):
        read.append(block)
        return reading(reader, block)

    monkeypatch.setattr(BlockReader, "read", counted)
    for block in (0, 1, 1, 2, 3):
        found.store.open(block)
        present = {
            name.split(".")[2]
            for name, tensor in found.model.state_dict().items()
            if ".layers." in name and not tensor.is_meta
        }
        assert present == {str(block)}
    for block in (2, 1, 0):
        found.store.open(block)
    assert read == [0, 1, 2, 3, 2, 1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_when_its_block_is_opened(tmp_path, value):
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=2)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    found = loaded(folder, Weights.DISK)
    found.store.open(0)
    with pytest.raises(SourceError, match=f"weight {name} holds NaN or Inf"):
        found.store.open(1)


def test_a_file_that_becomes_shorter_is_named(tmp_path):
    folder = save_searchable("llama", tmp_path / "source", num_hidden_layers=4)
    found = loaded(folder, Weights.DISK)
    os.truncate(folder / "model.safetensors", 20_000)
    with pytest.raises(SourceError, match="changed while it was read"):
        [found.store.open(block) for block in range(4)]


GIB = 1 << 30
SIZES = Sizes(outside=2 * GIB, blocks=(4 * GIB,) * 10, stored=40 * GIB, width=8)


@pytest.mark.parametrize(
    ("may", "expected"),
    [
        ({"device_bytes": 60 * GIB, "host_bytes": 60 * GIB}, Weights.RESIDENT),
        ({"device_bytes": 40 * GIB, "host_bytes": 60 * GIB}, Weights.HOST),
        ({"device_bytes": 40 * GIB, "host_bytes": 30 * GIB}, Weights.DISK),
        ({"device_bytes": 60 * GIB, "host_bytes": 60 * GIB, "weights": Weights.DISK}, Weights.DISK),
    ],
)
def test_a_gpu_takes_the_fastest_that_fits(may, expected):
    assert choose(SIZES, torch.device("cuda"), Allowance(**may))[0] is expected


def test_beside_a_cpu_the_hosts_memory_is_the_devices():
    may = {"device_bytes": 60 * GIB, "host_bytes": 30 * GIB}
    assert choose(SIZES, CPU, Allowance(**may))[0] is Weights.DISK
    assert choose(SIZES, CPU, Allowance(device_bytes=50 * GIB, host_bytes=60 * GIB))[0] is (
        Weights.RESIDENT
    )


@pytest.mark.parametrize("weights", [Weights.AUTO, Weights.RESIDENT, Weights.DISK])
def test_what_fits_nowhere_is_refused_with_what_would(weights):
    may = Allowance(weights=weights, device_bytes=8 * GIB, host_bytes=8 * GIB)
    with pytest.raises(OutOfMemory, match=r"8\.59 GB of cpu may be used") as caught:
        choose(SIZES, CPU, may)
    assert "--weights disk takes least, 31.31 GB" in caught.value.fix
    assert caught.value.exit_code == 6


def test_codes_may_take_a_few_times_the_weights_beside_a_cpus():
    def kept(weights, **may):
        return choose(SIZES, CPU, Allowance(weights=weights, **may))[1].kept

    assert kept(Weights.RESIDENT, host_bytes=100 * GIB) == Kept(packed=2 * GIB, decoded=4 * GIB)
    needed = SIZES.on_device(Weights.RESIDENT, is_gpu=False)
    little = kept(Weights.RESIDENT, host_bytes=needed + 6 * GIB)
    assert little == Kept(packed=GIB, decoded=2 * GIB), "half of what the weights leave"
    assert kept(Weights.RESIDENT, host_bytes=needed) == Kept()
    assert kept(Weights.DISK, host_bytes=100 * GIB) == Kept()
    assert Kept.beside(1000, GIB) == Kept(packed=3000, decoded=6000)


def test_codes_may_take_half_of_what_weights_leave_of_a_gpu():
    needed = SIZES.on_device(Weights.RESIDENT, is_gpu=True)
    may = Allowance(device_bytes=needed + 1000, host_bytes=60 * GIB)
    assert choose(SIZES, torch.device("cuda"), may)[1].kept == Kept(packed=500)
