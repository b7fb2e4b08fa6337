"""The files that are mutated, the commands that then read them, and what else may read them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import TOKENS
from hypothesis import strategies as st
from mutations import mutated_file, mutated_lines, mutated_safetensors, mutated_text, mutated_yaml
from searchable import save_searchable, save_text

TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role == 'system' %}[{{ m.content | trim }}]"
    "{% else %}{{ m['role'] ~ ': ' ~ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": "scale"}, {"role": "assistant", "content": "block"}]},
    {"prompt": "weight", "answer": "rounds"},
    {"text": "format layer expert router head"},
]
SPACE = """
schema_version: 1
name: fuzzed
scale_rules: [max, mse]
rules:
- {match: [o, "*.mlp.*"], formats: [nvfp4, fp8, bf16]}
- {match: "*", formats: [bf16], reason: kept}
"""
OF_A_RUN = (
    *("run.json", "groups.json", "splits.json", "calibration.json", "sensitivity.json"),
    *("result.json", "tokens.json", "seconds.json", "noise.json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fuzzed:
    """A file of a folder, and who reads it."""

    name: str
    folder: Path
    """Copied for every mutation; commands run in the copy."""
    file: str
    mutated: st.SearchStrategy[bytes]
    commands: tuple[tuple[str, ...], ...]
    accepts: Callable[[Path], object] | None = None
    """Raises where the library whose file it is refuses the folder."""

    @property
    def sound(self) -> bytes:
        return (self.folder / self.file).read_bytes()


def make_fuzzed(folder: Path, run: Callable[[tuple[str, ...], Path], None]) -> list[Fuzzed]:
    """Models, checkpoints, runs and settings in `folder`, each with a file to mutate.

    Args:
        folder: empty.
        run: runs a command line in a folder.
    """
    base = folder / "base"
    base.mkdir()
    save_searchable("llama", base / "model", num_hidden_layers=1)
    (base / "model" / "chat_template.jinja").write_text(TEMPLATE)
    save_searchable("llama", base / "sharded", num_hidden_layers=1, shard_size="60KB")
    save_text(base / "text", documents=12)
    (base / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS * 40))
    (base / "space.yaml").write_text(SPACE)
    text = ("--calibration", "text", *TOKENS)
    search = ("search", "model", "--budget-bpe", "11", *text, "--no-mlflow")
    run((*search, "--out", "run"), base)
    (base / "assignment.yaml").write_bytes((base / "run/assignment.yaml").read_bytes())
    (base / "settings.yaml").write_bytes((base / "run/config.resolved.yaml").read_bytes())
    once = ("--calibration", "text", *TOKENS[:2], *TOKENS[4:10])
    score = ("score", "model", "--assignment", "assignment.yaml", *once)
    calibrated = ("--calibrated", "run/calibration.json")
    export = ("export", "model", "--assignment", "assignment.yaml", *calibrated, "--out", "out")
    other = (*export[:-1], "compressed", "--layout", "compressed-tensors")
    run(other, base)
    interrupted = folder / "interrupted"
    shutil.copytree(base, interrupted)
    for name in ("result.json", "report.html"):
        (interrupted / "run" / name).unlink()
    shutil.rmtree(interrupted / "run/checkpoint")
    resume = (*search, "--out", "run", "--no-export")
    made: list[Fuzzed] = []

    def add(file: str, mutate: Callable[[bytes], Any], *commands: tuple[str, ...], **more: Any):
        where = more.pop("where", base)
        mutated = mutate((where / file).read_bytes())
        name = f"{file} of an unfinished run" if where is interrupted else file
        made.append(
            Fuzzed(name=name, folder=where, file=file, mutated=mutated, commands=commands, **more)
        )

    plan, sharded = ("plan", "model"), ("plan", "sharded")
    add("model/model.safetensors", mutated_safetensors, plan, score, accepts=_weights)
    add("sharded/model.safetensors.index.json", mutated_file, sharded)
    add("model/config.json", mutated_file, plan, score, accepts=_model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        add(f"model/{name}", mutated_file, score, export, accepts=_tokenizer)
    add("model/generation_config.json", mutated_file, export)
    chats = (*score[:4], "--calibration", "chats.jsonl", *once[2:])
    add("chats.jsonl", mutated_lines, chats)
    for checkpoint in ("run/checkpoint", "compressed"):
        verify = ("verify", checkpoint)
        both = (verify, ("score", "model", "--checkpoint", checkpoint, *once))
        add(f"{checkpoint}/config.json", mutated_file, *both)
        add(f"{checkpoint}/model.safetensors", mutated_safetensors, (*verify, "--source", "model"))
        add(f"{checkpoint}/autoquant.json", mutated_file, (*verify, "--source", "model"))
    add("run/checkpoint/hf_quant_config.json", mutated_file, ("verify", "run/checkpoint"))
    add("assignment.yaml", mutated_yaml, (*export, "--modelopt-recipe", "recipe.yaml"))
    add("space.yaml", mutated_yaml, ("plan", "model", "--space", "space.yaml"))
    add("settings.yaml", mutated_yaml, ("plan", "model", "--config", "settings.yaml"), resume)
    pages = (("report", "run"), ("compare", "run"))
    for name in OF_A_RUN:
        if (base / "run" / name).exists():
            add(f"run/{name}", mutated_file, *pages, resume)
            if name not in ("result.json", "tokens.json"):
                add(f"run/{name}", mutated_file, resume, where=interrupted)
    add("run/study.log", mutated_lines, *pages, resume)
    add("run/study.log", mutated_lines, resume, where=interrupted)
    add("run/assignment.yaml", mutated_yaml, *pages, resume)
    add("model/chat_template.jinja", mutated_text, chats)
    return made


def _weights(folder: Path) -> None:
    from safetensors.torch import load_file

    load_file(folder / "model/model.safetensors")


def _model(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "model", local_files_only=True)


def _tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)("a")
