"""Plans of published models at full size, from config.json alone."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from published import (
    ARCHITECTURES,
    BLOCK_FP8,
    PUBLISHED_NAMES,
    change_config,
    published,
    save_published,
)

from autoquant.source.source import open_source

CONFIGS = Path(__file__).parent / "configs"
"""Written by hand from what the publishers say of their models."""

GIB = 2**30


@pytest.fixture
def folder(tmp_path):
    def of(name):
        shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
        return tmp_path

    return of


def planned(folder, *arguments):
    """The plan of a process of its own, and the most memory that it took, in bytes."""
    code = "from autoquant.cli import cli; cli.main(standalone_mode=False)"
    command = [sys.executable, "-c", code, "plan", folder, *arguments, "--format", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return json.loads(done.stdout), peak * (1 if sys.platform == "darwin" else 1024)


def stored_as(header):
    """Dtypes and shape of what a file holds for a tensor."""
    scale = header.scales.header if header.scales is not None else header
    return header.dtype, header.stored_dtype, scale.dtype, scale.shape


def near(published):
    return pytest.approx(published, rel=0.015)


@pytest.mark.slow
def test_minimax_m2_5_has_the_published_sizes(folder):
    """126 GiB with NVFP4 experts; 230 GB as published in block FP8; 229B parameters in BF16."""
    plan, peak = planned(folder("minimax_m2.5"), "--space", "experts-only")
    assert plan["floor"]["checkpoint_bytes"] == near(126 * GIB)
    assert plan["source_bytes"] == near(230e9)
    assert plan["elements"] == near(229e9)
    assert plan["ceiling"]["bpe"]["checkpoint"] == pytest.approx(16, abs=0.01)
    assert sum(group["role"] == "experts" for group in plan["groups"]) == 62
    assert peak < 2e9
    assert any("sizes follow from its config.json" in line for line in plan["warnings"])


def test_nemotron_3_nano_has_the_published_sizes(folder, autoquant):
    """31.6B parameters: 23 Mamba, 23 expert and 6 attention layers."""
    plan = json.loads(autoquant("plan", folder("nemotron_3_nano"), "--format", "json").stdout)
    assert plan["elements"] == near(31.6e9)
    assert plan["source_bytes"] == pytest.approx(2 * plan["elements"], rel=1e-3)
    counts = Counter(group["role"] for group in plan["groups"])
    assert (counts["in"], counts["experts"], counts["qkv"]) == (23, 23, 6)
    assert plan["floor"]["bpe"]["checkpoint"] < 5


def test_modules_that_are_kept_are_counted_in_bf16(folder, autoquant):
    def source_bytes(kept):
        path = folder("minimax_m2.5")
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        change_config(
            path,
            num_hidden_layers=1,
            num_local_experts=2,
            quantization_config=config | {"modules_to_not_convert": kept},
        )
        return json.loads(autoquant("plan", path, "--format", "json").stdout)["source_bytes"]

    rows, columns = 3072, 48 * 128
    in_blocks = rows * columns + 4 * (rows // 128) * (columns // 128)
    assert source_bytes(["o_proj"]) - source_bytes([]) == 2 * rows * columns - in_blocks


def test_a_type_that_transformers_does_not_know_gets_a_word(folder, autoquant):
    path = folder("minimax_m2.5")
    change_config(path, model_type="minimax_m9")
    result = autoquant("plan", path)
    assert result.exit_code == 4
    assert "transformers knows no model of the type 'minimax_m9'" in result.stderr
    assert result.stdout == ""


def test_a_config_that_cannot_be_built_is_an_error(folder, autoquant):
    path = folder("minimax_m2.5")
    change_config(path, num_attention_heads="many")
    result = autoquant("plan", path)
    assert result.exit_code == 4
    assert "transformers cannot build the model that its config.json describes" in result.stderr


def test_weights_of_an_unknown_type_are_planned_with_a_warning(autoquant, tmp_path):
    from tiny_models import save_model

    path = save_model("llama", tmp_path / "model")
    change_config(path, model_type="llama_of_mine")
    result = autoquant("plan", path)
    assert result.exit_code == 0
    assert "transformers knows no model of the type 'llama_of_mine'" in result.stderr
    assert "qkv" in result.stdout


def test_a_search_needs_weights(folder, autoquant, tmp_path):
    path = folder("minimax_m2.5")
    result = autoquant("search", path, "--budget-bpe", 5, "--out", tmp_path / "run")
    assert result.exit_code == 4
    assert "holds neither model.safetensors nor model.safetensors.index.json" in result.stderr


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *(f"{kind}-fp8" for kind in BLOCK_FP8)])
def test_what_a_config_tells_is_what_the_weights_are(kind, tmp_path):
    """Names, shapes and dtypes, apart from draft layers and the dtype of vectors."""
    real = open_source(save_published(kind, tmp_path / "real"))
    (tmp_path / "bare").mkdir()
    shutil.copy(real.path / "config.json", tmp_path / "bare")
    derived = open_source(tmp_path / "bare", weights=False)
    config = json.loads((real.path / "config.json").read_text())
    layers = config.get("text_config", config).get("num_hidden_layers", 2)
    draft = re.compile(rf"mtp\..*|model\.layers\.{layers}\..*")
    expected = {h.name: h for h in real.headers if not draft.fullmatch(h.name)}
    names = PUBLISHED_NAMES.get(kind, {})
    told = {published(header.name, names): header for header in derived.headers}
    assert told.keys() == expected.keys()
    for name, header in told.items():
        other = expected[name]
        assert header.shape == other.shape
        if len(header.shape) > 1:
            assert stored_as(header) == stored_as(other)
