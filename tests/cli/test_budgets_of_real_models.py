"""The README's table of smallest budgets, and the budgets that it tells a reader to type."""

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "Qwen3-30B-A3B": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Qwen3-8B": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
}
"""The keys of their config.json that sizes follow from."""


@pytest.mark.parametrize(
    "name", [pytest.param("Qwen3-30B-A3B", marks=pytest.mark.slow), "Llama-3.1-8B", "Qwen3-8B"]
)
def test_the_smallest_budget_is_the_one_of_the_table(name, autoquant, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | {"dtype": "bfloat16"}))
    done = autoquant("plan", tmp_path, "--format", "json")
    assert done.exit_code == 0, done.stderr
    floor = json.loads(done.stdout)["floor"]["bpe"]
    row = rf"\| {re.escape(name)} \| [\d.]+B \| (.+) \| (.+) \|"
    shown = re.search(row, README)
    assert shown is not None, f"no row of {name}"
    smallest, of_searched = floor["checkpoint"], floor["searched"]
    assert (f"{smallest + 0.005:.2f}", f"{of_searched:.1f}") == shown.groups(), "rounded up"
    for asked in re.findall(rf"search Qwen/{name} --budget-bpe ([\d.,]+)", README):
        assert min(map(float, asked.split(","))) > smallest
