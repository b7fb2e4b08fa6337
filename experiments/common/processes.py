"""Parts of an experiment beside each other, each process with its share of the processor."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


def in_processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes, started anew, that share the processor's threads."""
    return ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(max(1, (os.cpu_count() or 1) // count),),
    )
