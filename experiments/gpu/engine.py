"""The engine at full size on one GPU: candidates against a plain forward, probes, peak memory.

    python experiments/gpu/engine.py --out experiments/gpu/results

Models have random weights, built on the device: what is measured is time and memory, not KL.
Times are medians over repeated runs, after one warm-up, of the same tokens.
"""

import argparse
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from autoquant.data.tokens import Split
from autoquant.formats import FP8, NVFP4
from autoquant.measure.gradient import gradient_probe
from autoquant.measure.scorer import Scorer
from autoquant.model import experts
from autoquant.model.inputs import InputScale, fill_unseen
from autoquant.model.live import QuantizedModel
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import group_tensors
from autoquant.source.headers import TensorHeader

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    use_cache=False,
)
MOE_30B = Qwen3MoeConfig(
    hidden_size=2048,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    vocab_size=151936,
    max_position_embeddings=8192,
    use_cache=False,
)
MODELS = {"llama-8b": LLAMA_8B, "moe-30b": MOE_30B}
DEVICE = torch.device("cuda")
PLAIN_BATCHES = (1, 4)
"""Numbers of parts that the plain forward's tokens are tried in; the fastest counts."""


def build(config: Any) -> Any:
    """The model with random BF16 weights on the GPU."""
    experts.register()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def disk_headers(model: Any) -> dict[str, TensorHeader]:
    """The headers that the model's publisher would store, experts apart."""
    headers = {}

    def add(name: str, shape: tuple[int, ...]) -> None:
        headers[name] = TensorHeader(
            name=name, dtype="BF16", shape=shape, file=Path("none"), begin=0, end=0
        )

    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            add(name, tuple(parameter.shape))
            continue
        container = name.rpartition(".")[0]
        count, rows, columns = parameter.shape
        products = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        for expert in range(count):
            for product in products:
                shape = (rows // len(products), columns)
                add(f"{container}.{expert}.{product}.weight", shape)
    return headers


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of `run` after one warm-up; garbage is collected before, as it takes long."""
    gc.collect()
    run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def plain_forward(model: Any, ids: torch.Tensor) -> tuple[float, str]:
    """Seconds of the fastest BF16 forward with logits that transformers offers, and which it is."""
    found = {}
    has_experts = isinstance(model.config, Qwen3MoeConfig)
    for name in ("grouped_mm", experts.IMPLEMENTATION) if has_experts else ("dense",):
        if has_experts:
            model.set_experts_implementation(name)
        for parts in PLAIN_BATCHES:

            def run(parts: int = parts) -> None:
                for part in ids.split(max(1, len(ids) // parts)):
                    model(part)

            with torch.inference_mode():
                found[f"{name} in {parts}"] = timed(run)
            torch.cuda.empty_cache()
    print(found, flush=True)
    best = min(found, key=lambda name: found[name])
    return found[best], best


def measure(name: str, tokens: int, length: int) -> dict[str, Any]:
    """Every figure of one model."""
    model = build(MODELS[name])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    headers = disk_headers(model)
    config = model.config.to_dict()
    groups = [g for g in group_tensors(headers, config, config) if g.role != "head"]
    ids = torch.randint(0, config["vocab_size"], (tokens // length, length), device=DEVICE)
    split = Split.unrelated("search", (ids,), digest="synthetic")

    baseline, fastest = plain_forward(model, ids)
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4, decoded_bytes=0)
    scorer = Scorer(quantized, DEVICE)
    scorer.check(split)
    with quantized.observing():
        scorer.forward([ids[:1]])
    amax, _ = fill_unseen(quantized.observed_ranges())
    quantized.set_input_scales({n: InputScale(amax=a) for n, a in amax.items()})
    torch.cuda.empty_cache()

    names = [group.name for group in groups]
    uniform = Assignment.of(dict.fromkeys(names, NVFP4))
    mixed = Assignment.of({n: FP8 if i % 3 == 0 else NVFP4 for i, n in enumerate(names)})
    turn = [0]

    def candidate() -> None:
        turn[0] += 1  # two assignments that differ from the first group on: no state is reused
        scorer.score_batches([[(uniform, mixed)[turn[0] % 2]]], split, [0])

    sample = [(g.name, NVFP4) for g in groups[:: max(1, len(groups) // 8)]]
    keys = [(name, NVFP4) for name in names]
    peaks: dict[str, float] = {}

    def phase(name: str, run: Callable[[], Any], repeats: int) -> float:
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(run, repeats)
        peaks[name] = torch.cuda.max_memory_allocated() / weights
        return seconds

    seconds = phase("candidate", candidate, 4)
    probes = phase("probe", lambda: list(scorer.probe(split, [(0, key) for key in sample])), 1)
    noise = phase("noise", lambda: scorer.noise(split, 0), 1)
    gradient = phase(
        "gradient probe", lambda: gradient_probe(scorer, split, keys, (), [].append, seed=0), 1
    )
    return {
        "model": name,
        "parameters": weights // 2,
        "groups": len(groups),
        "tokens": ids.numel(),
        "sequence_length": length,
        "sequences_at_once": scorer.room.sequences_at_once,
        "plain_forward": fastest,
        "plain_forward_seconds": baseline,
        "candidate_seconds": seconds,
        "candidate_over_plain": seconds / baseline,
        "probe_seconds": probes / len(sample),
        "probes_sampled": len(sample),
        "noise_seconds": noise,
        "gradient_probe_seconds": gradient,
        "gradient_probe_keys": len(keys),
        "weights_bytes": weights,
        "peak_over_weights": peaks,
        "profile": profile(candidate),
    }


def profile(run: Callable[[], None]) -> list[dict[str, Any]]:
    """All kernels of one candidate together, and those that take most of the GPU's time."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        run()
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1
    launches = sum(event.count for event in events)
    every = {"kernel": "all", "calls": launches, "ms": total / 1e3, "share": 1.0}
    return [every] + [
        {
            "kernel": event.key[:80],
            "calls": event.count,
            "ms": event.self_device_time_total / 1e3,
            "share": event.self_device_time_total / total,
        }
        for event in events[:14]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=2048)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for name in arguments.models:
        result = measure(name, arguments.tokens, arguments.length) | {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
        }
        (arguments.out / f"engine-{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k != "profile"}, indent=2))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
