"""What the help, the README and the pages tell a reader to type is typed here.

In a folder where the names that they use are tiny models, texts and runs.
"""

import functools
import gzip
import inspect
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant
import autoquant.api
from autoquant.cli import cli

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = (
    *("README.md", "search_spaces/README.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)

DENSE = ("my-model", "MODEL", "BIG-MODEL", "my-model-equalized")
WITH_EXPERTS = ("my-moe", "Qwen/Qwen3-30B-A3B")
RUNS = ("run", *(f"runs/{name}" for name in ("demo", "mine", "big", "a", "b", "A", "B", "NAME")))
FLAGS = zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True)
QUICK = {
    "trials": 2,
    "calibration": "texts",
    "effort": "fast",
    **{flag[2:].replace("-", "_"): value for flag, value in FLAGS},
}
"""Settings under which an example that does not name them takes a second, and needs no hub."""


def examples_of_the_help(command: click.Command = cli) -> Iterator[str]:
    yield from (line for line, _ in getattr(command, "examples", ()))
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from examples_of_the_help(child)


def examples_of(page: str) -> Iterator[str]:
    """Every indented line that begins with the command."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"^    (?:\.venv/bin/)?(autoquant .*)$", text, re.MULTILINE):
        yield line.partition("  #")[0].strip()


def python_of(text: str) -> str:
    """The indented block that begins with `import autoquant`."""
    block = re.search(r"^( *)import autoquant\n(?:\1.*\n|\s*\n)*", text, re.MULTILINE)
    assert block is not None
    return textwrap.dedent(block[0])


LINES = {
    line: None
    for line in [*examples_of_the_help(), *(line for page in PAGES for line in examples_of(page))]
    if "--with modelopt" not in line
    and "modelopt:" not in line  # tests/with_modelopt has those
    and "autoquant join" not in line  # joins a search of another process: tests/ranks has it
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder with a model, a text and a run under every name in use."""
    folder = tmp_path_factory.mktemp("examples")
    large = {"hidden_size": 256, "intermediate_size": 3072, "tie_word_embeddings": True}
    for name in DENSE:
        save_searchable("qwen3", folder / name, **large)
    experts = {"hidden_size": 128, "head_dim": 16, "num_attention_heads": 2, "num_experts": 64}
    for name in WITH_EXPERTS:
        save_searchable(
            "qwen3_moe",
            folder / name,
            **experts,
            num_key_value_heads=1,
            moe_intermediate_size=128,
            tie_word_embeddings=True,
        )
    save_text(folder / "texts", documents=300, words=20)
    run = autoquant.search(
        folder / "MODEL",
        budget_bpe=5.0,
        out=folder / RUNS[0],
        mlflow=False,
        **QUICK | {"calibration": str(folder / "texts")},
    )
    words = ["receipt", str(run.path)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    for name in RUNS[1:]:
        shutil.copytree(run.path, folder / name)
    save_what_tasks_and_receipts_need(folder, run.path)
    shutil.copy(run.path / "assignment.yaml", folder / "assignment.yaml")
    page = (ROOT / "search_spaces" / "README.md").read_text(encoding="utf-8")
    space = re.search(r"(?:^ {4}.*\n)+", page, re.MULTILINE)
    assert space is not None
    (folder / "first-layers-high.yaml").write_text(textwrap.dedent(space[0]))
    return folder


def save_what_tasks_and_receipts_need(folder: Path, run: Path) -> None:
    """Items and a task of them; a checkpoint, its model and its text, as somebody else has them."""
    items = [{"query": f"{n} and", "choices": ["more", "less"], "gold": n % 2} for n in range(6)]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "items.jsonl").write_text(lines)
    (folder / "items.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    page = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    task = re.search(r"(?:^ {4}(?=task:).*\n)(?:^ {4}.*\n)+", page, re.MULTILINE)
    assert task is not None
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(textwrap.dedent(task[0]))
    shutil.copy(run / "receipt.json", folder)
    for name in ("checkpoint", "downloaded"):
        shutil.copytree(run / "checkpoint", folder / name)
    shutil.copytree(folder / "MODEL", folder / "org" / "model")
    texts = (path.read_text() for path in sorted((folder / "texts").iterdir()))
    rows = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text("".join(rows))


def without_the_hub(words: list[str]) -> list[str]:
    """The words with a file of items in the place of tasks whose data the hub has."""
    return [re.sub("hellaswag(,gsm8k)?", "items.jsonl.gz", word) for word in words]


def test_budgets_of_the_bundled_model_in_examples_can_be_met(autoquant):
    for line in LINES:
        words = shlex.split(line)
        if words[1] == "search" and words[2].startswith("--budget-bpe"):
            for budget in words[3].split(","):
                done = autoquant("plan", "--budget-bpe", budget)
                assert done.exit_code == 0, f"{line}: {done.stderr}"


@pytest.fixture
def workspace(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    for module in ("autoquant.source.source", "autoquant.run.opening"):
        monkeypatch.setattr(f"{module}.REFERENCE_MODEL", made / "MODEL")
    return made


def quickly(words: list[str]) -> list[str]:
    """The quick settings that the command knows and the example does not name."""
    command = cli.get_command(click.Context(cli), words[1])
    assert command is not None, f"{words[1]} is no command"
    known = {flag for param in command.params for flag in param.opts}
    flags = {f"--{name.replace('_', '-')}": value for name, value in QUICK.items()}
    return [f"{flag}={flags[flag]}" for flag in flags.keys() & (known - set(words))]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_line_that_a_reader_is_told_to_type_does_what_it_says(line, workspace):
    typed, _, target = line.partition(" > ")
    words = without_the_hub(shlex.split(typed))
    for name in [words[n + 1] for n, word in enumerate(words) if word == "--out"]:
        if (workspace / name).is_dir() and words[1] in ("equalize", "export"):
            shutil.rmtree(workspace / name)
    done = CliRunner().invoke(cli, [*words[1:], *quickly(words)])
    assert done.exit_code == 0, done.stderr
    assert done.stdout
    if target:
        Path(target).write_text(done.stdout)


ASSIGNMENTS = re.findall(
    r"^    schema_version: 1\n    groups:.*\n(?: {6}.*\n)*",
    (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def test_an_assignment_that_a_reader_is_shown_can_be_scored(workspace, tmp_path):
    assert len(ASSIGNMENTS) == 2
    for shown in ASSIGNMENTS:
        file = tmp_path / "shown.yaml"
        file.write_text(textwrap.dedent(shown))
        words = ["score", "MODEL", "--assignment", str(file), "--kv-cache", "fp8"]
        done = CliRunner().invoke(cli, [*words, *quickly(["autoquant", *words])])
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    "text",
    [(ROOT / "README.md").read_text(encoding="utf-8"), inspect.getdoc(autoquant.api) or ""],
    ids=["README", "autoquant.api"],
)
def test_python_that_a_reader_is_shown_runs(text, workspace, monkeypatch):
    quick = functools.partial(autoquant.search, **QUICK)
    monkeypatch.setattr(autoquant.api, "search", quick)
    names: dict[str, object] = {}
    exec(python_of(text), names)
    assert isinstance(names["run"], autoquant.Run)
