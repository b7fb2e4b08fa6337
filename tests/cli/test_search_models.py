"""Models that a search takes as they are, and models that it refuses."""

import json

import pytest
import yaml
from searchable import save_searchable, save_tokenizer


@pytest.mark.slow
def test_a_width_that_nvfp4_cannot_take_is_said_and_searched(autoquant, search, tmp_path):
    model = save_searchable("llama", tmp_path / "odd", intermediate_size=172)
    plan = autoquant("plan", model, "--format", "json")
    groups = {group["name"]: group for group in json.loads(plan.stdout)["groups"]}
    down = groups["model.layers.0.mlp.down_proj"]
    assert "K divisible by 16, and K is 172" in down["closed"]["nvfp4"]
    _, run = search("--trials", 2, model=model, budget=9.5)
    assignment = yaml.safe_load((run / "assignment.yaml").read_text())["groups"]
    assert assignment["model.layers.0.mlp.down_proj"] in ("fp8", "fp8/gptq", "bf16")


def test_a_tokenizer_of_another_model_is_refused(search, tmp_path):
    model = save_searchable("llama", tmp_path / "small", vocab_size=64)
    result, _ = search(model=model, code=4, budget=9)
    assert "and the model embeds 64 tokens" in result.stderr


def test_transposed_matrices_are_refused(search, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    result, run = search(model=tmp_path / "gpt2", code=4)
    assert "holds no linear layer that can be quantized" in result.stderr
    assert "transformer.h.0.attn.c_attn.weight is one of its transposed matrices" in result.stderr
    assert not run.exists()


@pytest.mark.slow
def test_an_architecture_of_plain_linears_is_searched(search, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.12,
    )
    GPTNeoXForCausalLM(config).bfloat16().save_pretrained(tmp_path / "neox")
    save_tokenizer(tmp_path / "neox")
    _, run = search("--trials", 2, model=tmp_path / "neox", budget=9.5)
    groups = yaml.safe_load((run / "assignment.yaml").read_text())["groups"]
    assert "gpt_neox.layers.0.attention.query_key_value" in groups
    assert json.loads((run / "result.json").read_text())["bpe"]["checkpoint"] <= 9.5


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(autoquant, finished, text, tmp_path):
    other = save_searchable("qwen3_moe", tmp_path / "other", seed=1)
    result = autoquant(
        "score", other, "--checkpoint", finished[0] / "checkpoint", "--calibration", text
    )
    assert result.exit_code == 4
    assert "was not exported from" in result.stderr


def test_a_plain_model_is_no_checkpoint_to_score(autoquant, model, text):
    result = autoquant("score", model, "--checkpoint", model, "--calibration", text)
    assert result.exit_code == 4
    assert result.stdout == ""
    assert f"{model} holds no quantized weights" in result.stderr


@pytest.mark.parametrize("flags", [(), ("--assignment", "a.yaml", "--checkpoint", "b")])
def test_score_takes_an_assignment_or_a_checkpoint(autoquant, model, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").touch()
    result = autoquant("score", model, *flags)
    assert result.exit_code == 2
    assert "either --assignment FILE or --checkpoint DIR" in result.stderr
