"""Every command and flag is a promise: adding or dropping one is a decision, made here."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from autoquant.cli import cli

MODEL = {"[MODEL]", "--revision", "--config", "--format"}
BUDGET = {"--budget-bpe", "--budget-scope"}
DEVICE = {
    "--device",
    "--trust-remote-code",
    "--weights",
    "--device-memory",
    "--host-memory",
}
TOKENS = {
    "--calibration",
    "--seed",
    "--calibration-tokens",
    "--calibrate-all-experts",
    "--input-headroom",
    "--search-tokens",
    "--report-tokens",
    "--sequence-length",
    "--batch-tokens",
}
TRACKING = {"--study-storage", "--mlflow", "--no-mlflow", "--mlflow-experiment", "--mlflow-trials"}
EFFORT = {
    "--trials",
    "--sampler",
    "--trials-at-once",
    "--workers",
    "--max-seconds",
    "--max-tokens",
}
RUN = {"--out", "--resume", "--fresh", "--export", "--no-export"}

SEARCH = (
    MODEL
    | BUDGET
    | DEVICE
    | TOKENS
    | TRACKING
    | EFFORT
    | RUN
    | {
        "--space",
        "--effort",
        "--a16-share",
        "--target",
        "--activation-mode",
        "--kv-cache",
        "--layout",
        "--probe",
        "--sensitivity",
        "--cost",
        "--cost-limit",
        "--cost-table",
        "--report-by",
    }
)

SURFACE = {
    "": {"--version", "--debug"},
    "search": SEARCH,
    "join": SEARCH,
    "probe": MODEL
    | DEVICE
    | (TOKENS - {"--report-tokens"})
    | {"--out", "--resume", "--fresh", "--space", "--effort", "--a16-share"}
    | {"--target", "--activation-mode", "--kv-cache", "--probe"},
    "plan": MODEL
    | DEVICE
    | BUDGET
    | TOKENS
    | {"--space", "--effort", "--a16-share", "--forecast", "--measure"}
    | {"--probe", "--trials", "--trials-at-once"},
    "score": MODEL
    | DEVICE
    | TOKENS
    | {"--assignment", "--checkpoint", "--target", "--activation-mode", "--kv-cache", "--split"}
    | {"--report-by"},
    "equalize": MODEL
    | DEVICE
    | (TOKENS - {"--calibrate-all-experts", "--input-headroom"})
    - {"--search-tokens", "--report-tokens"}
    | {"--strength", "--parts", "--out"},
    "evaluate": (MODEL - {"[MODEL]"})
    | DEVICE
    | TOKENS
    | {"[MODEL|RUN|CHECKPOINT]", "--source", "--assignment", "--target", "--activation-mode"}
    | {"--kv-cache", "--tasks", "--limit", "--shots", "--chat-template", "--out"},
    "receipt": (MODEL - {"[MODEL]"})
    | DEVICE
    | TOKENS
    | {"[RUN|CHECKPOINT]", "--source", "--check", "--target", "--activation-mode", "--kv-cache"}
    | {"--out"},
    "export": MODEL
    | DEVICE
    | TOKENS
    | {"--assignment", "--calibrated", "--kv-cache", "--layout", "--modelopt-recipe", "--out"},
    "verify": {"CHECKPOINT", "--source", "--forward", "--revision", "--format"},
    "report": {"RUN", "--out", "--png", "--format"},
    "compare": {"RUN...", "--with", "--out", "--format"},
    "spaces": set(),
    "spaces list": {"--format"},
    "spaces show": {"NAME"},
    "spaces schema": set(),
    "env": {"--format"},
}


def commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, f"{path} {name}".strip())


def surface(command: click.Command) -> set[str]:
    return {
        name
        for param in command.params
        for name in (
            [param.human_readable_name]
            if isinstance(param, click.Argument)
            else [*param.opts, *param.secondary_opts]
        )
    }


def test_commands_and_flags_are_the_promised_ones():
    assert {path: surface(command) for path, command in commands(cli)} == SURFACE


def test_every_option_says_what_it_does():
    for path, command in commands(cli):
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{path} {param.opts[0]}"


def test_help_shows_every_command_with_its_whole_purpose(autoquant):
    words = " ".join(autoquant("--help").stdout.split())
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help
        assert f"{name} {command.help.partition(chr(10))[0]}" in words


def test_every_example_is_a_command_line_that_parses():
    paths = dict(commands(cli))
    for path, command in paths.items():
        for line, _ in getattr(command, "examples", ()):
            words = line.split(" > ")[0].split()
            assert words[0] == "autoquant", line
            depth = max(
                (n for n in range(1, len(words)) if " ".join(words[1 : n + 1]) in paths), default=0
            )
            assert depth, f"`{line}` in the help of `{path or 'autoquant'}` names no command"
            target = paths[" ".join(words[1 : depth + 1])]
            target.make_context(words[depth], words[depth + 1 :], resilient_parsing=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is absent")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["autoquant", "sea"], ["search"]),
        (["autoquant", "search", "--mlflow-t"], ["--mlflow-trials"]),
        (["autoquant", "search", "--probe", "e"], ["exact"]),
    ],
)
def test_the_shell_completes_after_the_line_of_the_help(autoquant, typed, offered):
    line = 'eval "$(_AUTOQUANT_COMPLETE=bash_source autoquant)"'
    assert line in autoquant("--help").stdout
    assert line in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    script = (
        f"{line}; COMP_WORDS=({' '.join(typed)}); COMP_CWORD={len(typed) - 1}; "
        '_autoquant_completion autoquant; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split() == offered, done.stderr
