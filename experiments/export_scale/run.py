"""Export of a checkpoint of random weights beside a plain copy of it: time, memory, kills.

Makes a source of the size asked, copies it (cp and fsync), exports it through the command line with
given input ranges, then starts the export again and again and kills it at random moments. Files of
the source are dropped from the system's cache before each timing, so that both read the disk.
"""

import argparse
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from autoquant.export.layouts.base import StoredTensor
from autoquant.export.writer import ShardWriter
from autoquant.files import to_json, write_atomic
from autoquant.formats import BF16, FP8, NVFP4, Choice, ScaleRule
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import Groups, find_groups
from autoquant.source.source import open_source

SHARD_BYTES = 5_000_000_000
VOCABULARY = 128_256
SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
"""Llama 3 70B and Qwen3 30B-A3B, with as many layers as the size asks for."""


def tensors_of(config: dict[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """Names and shapes [out, in] of one decoder layer's linears."""
    hidden = config["hidden_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    prefix = f"model.layers.{layer}"
    shapes = {
        f"{prefix}.self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}.self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
    }
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    blocks = [f"{prefix}.mlp"]
    if "num_experts" in config:
        shapes[f"{prefix}.mlp.gate.weight"] = (config["num_experts"], hidden)
        blocks = [f"{prefix}.mlp.experts.{number}" for number in range(config["num_experts"])]
    for block in blocks:
        shapes[f"{block}.down_proj.weight"] = (hidden, width)
        shapes[f"{block}.gate_proj.weight"] = (width, hidden)
        shapes[f"{block}.up_proj.weight"] = (width, hidden)
    return shapes


def make_source(folder: Path, kind: str, size: int) -> None:
    """Write normal weights of about `size` bytes in shards of 5 GB, with config and index."""
    config = SHAPES[kind] | {"vocab_size": VOCABULARY, "tie_word_embeddings": False}
    table = (VOCABULARY, config["hidden_size"])
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    layers = 0
    while 2 * sum(rows * columns for rows, columns in tensors.values()) < size:
        tensors |= tensors_of(config, layers)
        layers += 1
    folder.mkdir(parents=True)
    shards = list(_shards(tensors))
    placed = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = [StoredTensor(name=name, dtype="BF16", shape=tensors[name]) for name in names]
        with ShardWriter(folder / file, stored, {"format": "pt"}) as shard:
            for name in names:
                weight = torch.empty(tensors[name], dtype=torch.bfloat16).normal_(std=0.02)
                shard.put(name, weight)
        placed |= dict.fromkeys(names, file)
    write_atomic(folder / "model.safetensors.index.json", to_json({"weight_map": placed}))
    config |= {"num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    write_atomic(folder / "config.json", to_json(config, indent=2))


def _shards(tensors: dict[str, tuple[int, int]]) -> Iterator[list[str]]:
    names: list[str] = []
    room = SHARD_BYTES
    for name, (rows, columns) in sorted(tensors.items()):
        if 2 * rows * columns > room and names:
            yield names
            names, room = [], SHARD_BYTES
        names.append(name)
        room -= 2 * rows * columns
    yield names


def make_assignment(groups: Groups) -> Assignment:
    """What a search at 5 bits leaves: NVFP4 of every rule, some FP8, a few layers as they are."""
    cycle = [Choice(NVFP4.format, rule) for rule in ScaleRule] * 3 + [FP8] * 2 + [BF16]
    wide = {g.name: cycle[i % len(cycle)] for i, g in enumerate(groups) if g.role != "head"}
    return Assignment.of(wide | {g.name: BF16 for g in groups if g.role == "head"})


def drop_from_cache(folder: Path) -> None:
    """Make the next reader of `folder` read the disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Time of `cp` and of waiting until the disk holds the copy, which is removed again."""
    drop_from_cache(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def start_export(work: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command line on the source of `work`, its standard error in `log`."""
    options = ["--assignment", work / "assignment.yaml", "--calibrated", work / "calibration.json"]
    line = ["-m", "autoquant", "export", work / "source", *options, "--out", work / "export"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *map(str, line)], stderr=stream, stdout=subprocess.DEVNULL
        )


def timed_export(work: Path, log: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of a whole export, started from nothing."""
    drop_from_cache(work / "source")
    started = time.perf_counter()
    process = start_export(work, log)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(log.read_text())
    return seconds, usage.ru_maxrss * 1024


def kill_exports(work: Path, log: Path, seconds: float, kills: int) -> list[dict[str, Any]]:
    """Start the export `kills` times and kill it at a random moment of its time.

    A folder that is there after a kill must be complete; then it is removed.
    """
    generator = random.Random(0)
    rows = []
    for _ in range(kills):
        process = start_export(work, log)
        moment = generator.uniform(0, 1.1 * seconds)
        timer = threading.Timer(moment, process.kill)
        timer.start()
        process.wait()
        timer.cancel()
        there = (work / "export").exists()
        rows.append({"after_s": round(moment, 2), "exit": process.returncode, "folder": there})
        if there:
            require_complete(work)
            shutil.rmtree(work / "export")
    return rows


def require_complete(work: Path) -> None:
    """End with an error unless the export passes `autoquant verify`."""
    line = [sys.executable, "-m", "autoquant", "verify", str(work / "export")]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run everything in a scratch folder and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder, removed at the end"
    )
    parser.add_argument("--kind", choices=SHAPES, default="dense")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the source for another run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    work: Path = args.work
    source = work / "source"
    if not source.exists():  # in a process of its own: its memory is not the export's
        task = multiprocessing.get_context("spawn").Process(
            target=make_source, args=(source, args.kind, int(args.gigabytes * 1e9))
        )
        task.start()
        task.join()
    opened = open_source(source)
    groups = find_groups(opened)
    assignment = make_assignment(groups)
    (work / "assignment.yaml").write_text(yaml.safe_dump(assignment.to_dict(), sort_keys=False))
    ranges = {linear.input_scale_set: 8.0 for linear in groups.linears}
    (work / "calibration.json").write_text(to_json({"schema_version": 1, "input_amax": ranges}))
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / f"{args.kind}.stderr.txt"
    copying = copy_seconds(source, work / "copy")
    exporting, memory = timed_export(work, log)
    require_complete(work)
    written = sum(file.stat().st_size for file in (work / "export").iterdir())
    shutil.rmtree(work / "export")
    killed = kill_exports(work, work / "killed.txt", exporting, args.kills)
    again, _ = timed_export(work, work / "again.txt")
    require_complete(work)
    shutil.rmtree(work / "export")
    result = {
        "kind": args.kind,
        "commit": _output("git", "rev-parse", "HEAD"),
        "machine": f"{_output('sh', '-c', 'grep -m1 model.name /proc/cpuinfo | cut -d: -f2')}, "
        f"{os.cpu_count()} cores, {platform.system()}",
        "load_average": os.getloadavg(),
        "source_bytes": opened.headers.bytes,
        "tensors": len(opened.headers),
        "largest_tensor_bytes": max(tensor.bytes for tensor in opened.headers),
        "export_bytes": written,
        "counts": assignment.counts(),
        "copy_s": copying,
        "export_s": exporting,
        "export_speed_of_copy": copying / exporting,
        "peak_rss_bytes": memory,
        "killed": killed,
        "left_after_last": sorted(entry.name for entry in work.iterdir() if "export" in entry.name),
        "export_after_kills_s": again,
    }
    (args.out / f"{args.kind}.json").write_text(to_json(result, indent=2) + "\n")
    print(to_json(result, indent=2))
    if not args.keep:
        shutil.rmtree(work)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
