"""A search on a terminal and in a pipe."""

import io
import os
import pty
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from autoquant.cli.terminal import Terminal
from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from autoquant.progress import Unit
from autoquant.search.trials import Stage, Trial


def trial(number: int, kl: float, **changes) -> Trial:
    settings = {
        "number": number,
        "stage": Stage.SWAP,
        "name": "[layers.0] to fp8",
        "assignment": Assignment.of({"layers.0": Choice.parse("fp8")}),
        "kl": kl,
        "stderr": 0.0005,
        "sequence_kl": (kl,),
        "tokens": 512,
        "is_stopped": False,
        "bpe": 4.986,
        "fits": True,
        "seconds": 1.5,
        "params": {},
    }
    return Trial(**(settings | changes))


def search(terminal: Terminal) -> None:
    """What a search of forty trials says."""
    terminal.note("run directory: runs/[demo]")
    terminal.stage("probe", 20)
    for _ in range(20):
        terminal.step()
    terminal.stage("refine", 40)
    best = trial(0, 0.01683)
    terminal.trial(trial(1, 0.5, fits=False), None)
    for number in range(2, 30):
        terminal.trial(trial(number, 0.02, is_stopped=number == 9), best)
    terminal.warn("little text")
    terminal.stage("export", 4_000_000_000, Unit.BYTES)
    terminal.step(4_000_000_000)


@contextmanager
def screen(monkeypatch, kind="xterm-256color") -> Iterator[Callable[..., str]]:
    """Standard error as a terminal of 100 columns; a call reads what was written to it."""
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "100")
    os.set_blocking(master, False)
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)

        def read(pattern: str = "") -> str:
            """What is written from now on until the last table matches the pattern."""
            stream.flush()
            found, deadline = b"", time.monotonic() + 30
            while True:
                with suppress(BlockingIOError):
                    found += os.read(master, 65536)
                text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.decode(errors="ignore"))
                if re.search(pattern, text.rpartition("stage ")[2], re.DOTALL):
                    return text
                assert time.monotonic() < deadline, text
                time.sleep(0.02)

        yield read
    os.close(master)


def test_a_terminal_shows_a_table_of_stages_with_the_best_and_the_time_left(monkeypatch):
    with screen(monkeypatch) as read, Terminal() as terminal:
        search(terminal)
        live = read(r"export .* 4\.00 GB/4\.00 GB 0:00:0")
    assert re.search(r"stage +done +time +left +best KL +BPE", live)
    assert re.search(r"refine .* 29/40 .* 0\.01683 4\.986", live)
    assert "run directory: runs/[demo]" in live
    assert "warning: little text" in live


def test_the_trial_measured_last_stands_below_the_table_until_its_stage_ends(monkeypatch):
    with screen(monkeypatch) as read, Terminal() as terminal:
        terminal.stage("refine", 2)
        terminal.trial(trial(7, 0.02), None)
        read(r"trial   7  kl=0\.02000 \+-0\.00050 bpe=4\.986  1\.5s  swap: \[layers\.0\] to fp8")
        terminal.stage("confirm", 1)
        live = read("confirm").rpartition("stage ")[2]
    assert "trial" not in live


def test_the_next_budget_begins_a_table_of_its_own(monkeypatch):
    with screen(monkeypatch) as read, Terminal() as terminal:
        search(terminal)
        terminal.stage("probe", 0)
        terminal.stage("refine", 3)
        terminal.trial(trial(0, 0.01), trial(0, 0.01))
        live = read(r"refine .* 1/3 .* 0\.01000 4\.986").rpartition("stage ")[2]
    assert "probe" not in live
    assert "export" not in live


@pytest.mark.parametrize("kind", ["pipe", "dumb terminal"])
def test_elsewhere_each_trial_is_a_line(kind, monkeypatch):
    if kind == "pipe":
        monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
        with Terminal() as terminal:
            search(terminal)
        lines = stream.getvalue().splitlines()
    else:
        with screen(monkeypatch, "dumb") as read:
            with Terminal() as terminal:
                search(terminal)
            lines = read(r"export 4\.00 GB/4\.00 GB").splitlines()
    trials = [line for line in lines if line.startswith("trial ")]
    assert len(trials) == 29
    assert "(over budget)  none fits yet" in trials[0]
    assert "best=0.01683 bpe=4.986" in trials[1]
    assert [number for number, line in enumerate(trials, start=1) if "stopped early" in line] == [9]
    assert "probe 10/20, 0 s left" in lines
    assert "warning: little text" in lines
    assert "export 4.00 GB/4.00 GB" in lines


def test_a_stage_of_few_steps_says_where_it_is_every_minute(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with Terminal() as terminal:
        terminal.stage("calibrate", 5)
        began = time.monotonic()
        for seconds in (1, 61, 80, 122, 130):
            monkeypatch.setattr(time, "monotonic", lambda now=began + seconds: now)
            terminal.step()
    assert [line.partition(",")[0] for line in stream.getvalue().splitlines()] == [
        "calibrate: 5 steps",
        "calibrate 2/5",
        "calibrate 4/5",
    ]


def test_an_error_that_is_not_known_is_left_out(capsys):
    with Terminal() as terminal:
        terminal.stage("refine", 2)
        terminal.trial(trial(0, 0.5, stderr=float("nan")), None)
    assert "kl=0.50000 bpe=4.986" in capsys.readouterr().err
