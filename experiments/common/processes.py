"""Parts of an experiment in processes of their own."""

import json
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def in_processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes, started anew, that share the processor's threads."""
    return ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, (os.cpu_count() or 1) // count),),
    )


def figures_of(command: Sequence[str]) -> dict[str, Any]:
    """The JSON that a command prints in its last line.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
