r"""Every supported architecture through every command, as the table of docs/architectures.md.

    python experiments/architectures/run.py --vllm-python PYTHON --vllm-check SCRIPT \
        --sglang-python PYTHON

Each row is a miniature that the architecture's own transformers class makes, saved as its
publisher saves it. A cell is what a command did with it; none is filled in by hand. Rows are kept
in results/ with the versions that made them, and the page is made of them. The cells of an engine
need an interpreter that has it; vLLM's also a script that takes a checkpoint, lets vLLM load it on
a CPU, and prints `{"modules": {name: method}}`.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "architectures")]

from cells import LAYOUTS, Journey  # noqa: E402
from conditions import CONDITIONS  # noqa: E402
from published import ARCHITECTURES, BLOCK_FP8, save_published  # noqa: E402

from autoquant.cli import cli  # noqa: E402
from autoquant.export.layouts.modules import experts_container  # noqa: E402
from autoquant.plan.assignment import Assignment  # noqa: E402
from autoquant.plan.grouping import find_groups  # noqa: E402
from autoquant.source.source import open_source  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ENGINES = ("vLLM", "SGLang")
COLUMNS = (
    *("plan", "search", "export", "verify", "verify --forward"),
    *(f"{engine} {layout}" for engine in ENGINES for layout in LAYOUTS),
)
NOT_EVEN_SOURCE = "not here"
"""Where this engine does not load the unquantized model on this machine either."""

HERE = Path(__file__).parent

TITLES = {
    "llama": "Llama: dense",
    "qwen3": "Qwen3: dense, tied embeddings",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next: linear attention, MoE with a shared expert",
    "mixtral": "Mixtral: MoE",
    "minimax_m2": "MiniMax-M2: MoE",
    "minimax_m3_vl": "MiniMax-M3: vision-language, sparse attention, MoE",
    "deepseek_v3": "DeepSeek-V3: MLA, MoE, draft layer",
    "glm4_moe": "GLM-4-MoE: draft layer",
    "nemotron_h": "Nemotron-H: Mamba, attention, MoE",
    "gpt_oss": "gpt-oss: MoE with joined experts",
    "qwen3_vl_moe": "Qwen3-VL-MoE: vision-language, joined experts",
    "gemma2": "Gemma 2: capped logits",
    "gemma3": "Gemma 3: text",
    "gemma4_text": "Gemma 4: dense, capped logits",
    "gemma4_moe": "Gemma 4: MoE beside an MLP",
    "cohere2": "Cohere2: scaled logits",
    "granite": "Granite: scaled logits",
    "falcon_h1": "Falcon-H1: Mamba beside attention",
    "glm_moe_dsa": "GLM-5: MLA, indexer, MoE",
    "deepseek_v32": "DeepSeek-V3.2: MLA, indexer, MoE",
    "deepseek_v4": "DeepSeek-V4: compressed attention, MoE",
    "kimi_linear": "Kimi-Linear: linear attention, MLA, MoE",
    "qwen3_5": "Qwen3.5: text, linear attention",
    "qwen3_5_moe": "Qwen3.5-MoE: text, linear attention",
    "lfm2": "LFM2: short convolutions",
    "lfm2_moe": "LFM2-MoE",
    "zamba2": "Zamba2: Mamba, shared blocks",
    "olmo_hybrid": "OLMo-Hybrid: linear attention",
    "llama4": "Llama 4: text, joined experts",
}


KINDS = (*ARCHITECTURES, *(f"{kind}-fp8" for kind in BLOCK_FP8))


@dataclass
class Row:
    """One architecture."""

    kind: str
    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """What made the row. AutoQuant's is the tree that git has for its sources."""

    def run(self, column: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, whose failure is the cell; None if it failed."""
        try:
            result = work()
        except Exception as error:
            self.cells[column] = "fails"
            self.notes.append(f"{self.kind}, {column}: {_line(error)}")
            return None
        self.cells.setdefault(column, "ok")
        return result


@dataclass(frozen=True)
class Engine:
    """How to let a serving engine load a checkpoint."""

    name: str
    command: tuple[str | Path, ...]
    """Takes a checkpoint, prints `{"modules": {name: method}}`."""

    def version(self) -> str:
        """Of the installed engine."""
        ask = f"import importlib.metadata as m; print(m.version({self.name.lower()!r}))"
        command = [self.command[0], "-c", ask]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def methods(self, checkpoint: Path) -> dict[str, str]:
        """Quantization method by module.

        Raises:
            RuntimeError: the engine refused; its last words.
        """
        done = subprocess.run(
            [*self.command, checkpoint], capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if re.search(r"\w+Error\b", line)]
            raise RuntimeError(
                errors[-1].removeprefix("[rank0]: ") if errors else done.stderr[-300:]
            )
        modules: dict[str, str] = json.loads(done.stdout[done.stdout.index("{\n") :])["modules"]
        return modules

    def loads(self, folder: Path) -> bool:
        """Whether the engine loads a model at all."""
        try:
            self.methods(folder)
        except RuntimeError:
            return False
        return True


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def journey(kind: str, folder: Path, engines: Iterable[Engine]) -> Row:
    row = Row(kind)
    own = Journey(save_published(kind, folder / "source"), folder, call)
    plan = row.run("plan", own.plan)
    if plan is None:
        return row
    result = row.run("search", lambda: own.search(plan))
    row.run("search", lambda: _require_same_kl(own, result))
    row.run("verify --forward", lambda: own.verify(own.run / "checkpoint", "--forward"))
    for number, assignment in enumerate(own.mixes(plan)):
        for layout in LAYOUTS:
            name = f"{layout}-{number}"
            exported = row.run("export", partial(own.export, assignment, layout, name))
            if exported is None:
                continue
            row.run("verify", partial(own.verify, exported))
            for engine in engines:
                column = f"{engine.name} {layout}"
                if _ask(engine, row, column, exported, own, assignment):
                    continue
                condition = CONDITIONS.get((kind.removesuffix("-fp8"), column))
                if condition:
                    changed = condition.change(plan["groups"], assignment)
                    other = own.export(changed, layout, f"{name}-{engine.name}")
                    if _ask(engine, row, column, other, own, changed):
                        row.cells[column] = f"if {condition.said}"
    return row


def versions(engines: Iterable[Engine]) -> dict[str, str]:
    """What makes rows now: AutoQuant's sources, the packages, the engines."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD:autoquant"]
    tree = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"autoquant": tree, **packages, **{own.name: own.version() for own in engines}}


def _require_same_kl(own: Journey, result: Mapping[str, Any]) -> None:
    measured = own.score(own.run / "checkpoint")["kl"]
    if measured != result["kl"]:
        raise RuntimeError(f"searched {result['kl']['mean']}, stored {measured['mean']}")


def _ask(
    engine: Engine, row: Row, column: str, exported: Path, own: Journey, assignment: Assignment
) -> bool:
    """Fill the engine's cell: it loads the checkpoint, and each module has its format."""
    before = len(row.notes)
    methods = row.run(column, partial(engine.methods, exported))
    if methods is not None:
        row.run(column, lambda: _require_formats(methods, own, assignment))
    elif not engine.loads(own.source):
        row.cells[column] = NOT_EVEN_SOURCE
    return len(row.notes) == before


def _require_formats(methods: Mapping[str, str], own: Journey, assignment: Assignment) -> None:
    """Raise unless every group is there what the assignment says, and all else in BF16."""
    found = {
        _place(name): _format(method) for name, method in methods.items() if "KVCache" not in method
    }
    wanted = {}
    for group in find_groups(open_source(own.source)):
        for linear in group.linears:
            container = experts_container(linear.name)
            names = (*linear.engine_names, *([container] if container else ()), linear.name)
            places = [p for p in map(_place, names) if p in found] or [linear.name]
            wanted |= dict.fromkeys(places, str(assignment[group.name].format))
    for place in wanted.keys() | found.keys():
        if found.get(place) != wanted.get(place, "bf16"):
            raise RuntimeError(f"{place} is {found.get(place)} and was to be {wanted.get(place)}")


def _place(name: str) -> str:
    """A module's name from its layer on, as all spellings share it; whole in a vision tower."""
    if "vision" in name:
        return name
    inner = name[name.find("layers.") :] if "layers." in name else name.rpartition(".")[2]
    for theirs, ours in (
        (".routed_experts", ""),
        (".block_sparse_moe.", ".mlp."),
        (".ffn.", ".mlp."),
        (".attn.", ".self_attn."),
        (".short_conv.", ".conv."),
        (".mamba.mamba.", ".mamba."),
        (".self_attn.", "."),  # SGLang's Qwen3-Next has none
    ):
        inner = inner.replace(theirs, ours)
    return inner


def _format(method: str) -> str:
    lowered = method.lower()
    if "unquantized" in lowered:
        return "bf16"
    return "nvfp4" if "fp4" in lowered else "fp8" if "fp8" in lowered else method


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with what made them and what did not work below."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes: list[str] = []
    for row in rows:
        cells = " | ".join(row.cells.get(column, "not run") for column in COLUMNS)
        title = TITLES[row.kind.removesuffix("-fp8")]
        source = " (block FP8)" if row.kind.endswith("-fp8") else ""
        lines.append(f"| {title}{source} | {cells} |")
        notes += row.notes
    listed = [f"- {note}" for note in dict.fromkeys(notes)]
    return "\n".join([*lines, "", *_made_with(rows), "", *listed]).rstrip() + "\n"


def _made_with(rows: Iterable[Row]) -> list[str]:
    """How many rows which versions made."""
    counted = Counter(
        ", ".join(f"{name} {own}" for name, own in row.versions.items()) for row in rows
    )
    return [f"Made with {made}: {count} rows.  " for made, count in counted.items() if made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", type=Path, help="interpreter that has vLLM")
    parser.add_argument("--vllm-check", type=Path, help="script that lets vLLM load a checkpoint")
    parser.add_argument("--sglang-python", type=Path, help="interpreter that has SGLang")
    parser.add_argument("--only", nargs="*", help="rows to make; the page keeps the others")
    arguments = parser.parse_args()
    engines = []
    if arguments.vllm_python and arguments.vllm_check:
        script = HERE / "vllm_on_any_cpu.py"
        engines.append(Engine("vLLM", (arguments.vllm_python, script, arguments.vllm_check)))
    if arguments.sglang_python:
        script = HERE / "sglang_on_any_cpu.py"
        engines.append(Engine("SGLang", (arguments.sglang_python, script)))
    RESULTS.mkdir(exist_ok=True)
    made_with = versions(engines)
    for kind in arguments.only or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            row = journey(kind, Path(folder), engines)
        row.versions = made_with
        (RESULTS / f"{kind}.json").write_text(json.dumps(asdict(row), indent=1) + "\n")
        print(table([row]), flush=True)
    files = [file for kind in KINDS if (file := RESULTS / f"{kind}.json").exists()]
    rows = [Row(**json.loads(file.read_text())) for file in files]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
