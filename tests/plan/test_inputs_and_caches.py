"""Which inputs a serving machine quantizes, and what the scales of a cache take."""

import pytest
from test_grouping import grouped
from tiny_models import save_model

from autoquant.errors import ConfigError
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.kv_cache import attention_modules, cache_bytes, cached_attention
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source

A16 = Choice.parse("nvfp4/mse/a16")


@pytest.mark.parametrize(
    ("mode", "quantized"),
    [(ActivationMode.W4A4, {NVFP4, FP8}), (ActivationMode.W4A16, {FP8})],
)
def test_a_machine_without_products_of_four_bits_keeps_inputs_of_nvfp4(mode, quantized):
    choices = {NVFP4, A16, FP8, BF16}
    assert {choice for choice in choices if mode.quantizes_input(choice)} == quantized
    assert mode.fewest_bits == min(choice.format.input_bits for choice in quantized)


def attention(layers, parts):
    return grouped(
        {
            f"model.layers.{i}.self_attn.{part}_proj.weight": (16, 16)
            for i in range(layers)
            for part in parts
        }
    )


def test_every_attention_with_keys_and_values_of_its_own_has_two_scales_of_four_bytes():
    groups = attention(11, "qkvo")
    modules = [f"model.layers.{i}.self_attn" for i in range(11)]
    assert list(attention_modules(groups)) == modules
    assert cached_attention(KvCache.FP8, groups) == tuple(modules)
    assert cached_attention(KvCache.BF16, groups) == ()
    assert cache_bytes(KvCache.FP8, groups) == 11 * 2 * 4
    assert cache_bytes(KvCache.BF16, groups) == 0


@pytest.mark.parametrize("parts", ["qo", "qko", "qvo"])
def test_a_cache_needs_both_keys_and_values(parts):
    with pytest.raises(ConfigError, match="needs attention with k_proj and v_proj"):
        cache_bytes(KvCache.FP8, attention(2, parts))


def test_the_scales_of_a_cache_count_as_bytes_of_the_checkpoint(tmp_path):
    source = open_source(save_model("llama", tmp_path))
    without, with_cache = (
        make_plan(source, load_space("default"), cache) for cache in (KvCache.BF16, KvCache.FP8)
    )
    assert with_cache.accounting.added_bytes == 2 * 2 * 4
    for one, other in ((without.floor, with_cache.floor), (without.ceiling, with_cache.ceiling)):
        more = with_cache.accounting.checkpoint_bytes(other)
        assert more == without.accounting.checkpoint_bytes(one) + 16
