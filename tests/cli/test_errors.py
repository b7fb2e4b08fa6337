"""How a command ends: the exit code, two lines on standard error, nothing on standard output."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner, Result

from autoquant import errors
from autoquant.cli.group import Interrupted, LazyGroup

KINDS = [
    (errors.ConfigError, 2),
    (errors.InfeasibleBudget, 3),
    (errors.SourceError, 4),
    (errors.RunConflict, 5),
    (errors.OutOfMemory, 6),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command that raises what it is given."""

    def call(error: BaseException, *arguments: str) -> Result:
        @click.command("fail")
        def command() -> None:
            raise error

        module = ModuleType("autoquant_failing_command")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        group = LazyGroup(
            "autoquant",
            modules={"fail": module.__name__},
            examples=[],
            params=[click.Option(["--debug"], is_flag=True)],
            callback=lambda debug: None,
        )
        return CliRunner().invoke(group, [*arguments, "fail"])

    return call


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_a_user_error_is_two_lines_and_its_exit_code(failing, kind, code):
    result = failing(kind("budget 4.0 is under the floor 4.9.", fix="raise --budget-bpe to 4.9."))
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == (
        "error: budget 4.0 is under the floor 4.9.\n  fix: raise --budget-bpe to 4.9.\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate"),
    ],
    ids=["python", "gpu", "cpu allocator"],
)
def test_running_out_of_memory_is_exit_6(failing, error):
    result = failing(error)
    assert result.exit_code == 6
    assert result.stderr.startswith("error: out of memory: ")
    assert len(result.stderr.splitlines()) == 2


def test_a_full_disk_is_named(failing):
    result = failing(
        OSError(errno.ENOSPC, "No space left on device", "checkpoint/model.safetensors")
    )
    assert result.exit_code == 4
    assert "the disk is full" in result.stderr
    assert "checkpoint/model.safetensors" in result.stderr


def test_a_bug_is_exit_1_without_a_traceback(failing):
    result = failing(KeyError("layer"))
    assert result.exit_code == 1
    assert "KeyError: 'layer'" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_debug_lets_the_error_through(failing):
    error = errors.ConfigError("bad.", fix="mend it.")
    assert failing(error, "--debug").exception is error


def test_an_interruption_is_exit_130_with_the_line_that_goes_on(failing):
    result = failing(Interrupted("autoquant search --out runs/a"))
    assert result.exit_code == 130
    assert result.stderr.endswith("to go on from here:\n  autoquant search --out runs/a\n")
    assert failing(KeyboardInterrupt()).exit_code == 130


def test_an_unknown_command_is_exit_2(autoquant):
    result = autoquant("serach")
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_command_as_an_interruption(number):
    script = textwrap.dedent("""
        import sys, time, types, click
        from autoquant.cli import MODULES, main

        @click.command()
        def command():
            print("ready", flush=True)
            time.sleep(60)

        sys.modules["sleeper"] = types.SimpleNamespace(command=command)
        MODULES["sleep"] = "sleeper"
        sys.argv = ["autoquant", "sleep"]
        main()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "\ninterrupted\n"


def test_a_reader_that_closes_the_pipe_is_no_error():
    script = "import sys; sys.argv = ['autoquant', 'spaces', 'schema']\n" + (
        "from autoquant.cli import main\nimport autoquant.plan.space_file\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\nmain()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
