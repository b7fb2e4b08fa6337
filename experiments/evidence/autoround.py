"""AutoRound's AutoScheme and its tuned rounding at the bytes of one of our budgets.

    pip install auto-round==0.16.1
    python -m experiments.evidence.autoround MODEL --text TEXT --budget-bpe 5.0 \
        --work runs/peers/autoround --out runs/peers/autoround-5.0

Of its formats those are open that one checkpoint of it can hold together: NVFP4, MXFP8 and BF16. A
choice of NVFP4 and static FP8 cannot be written: "Unsupported layer scheme: data_type=fp, bits=8,
act_bits=8". Linears that engines multiply as one share a scheme, as its documentation asks.
"""

import argparse
import os
import shutil
from pathlib import Path

from experiments.evidence.peers import Room, add_arguments, keep, watch, write_text

JOB = Path(__file__).with_name("autoround_job.py")

SCALARS = 8
"""Bytes of the two scales of an NVFP4 tensor, which its bits do not count."""

SAMPLES, LENGTH = 128, 512
"""Its own number of sequences; in its own length, 2,048 tokens, the text has not as many."""

ONE_BY_ONE = {"AR_ENABLE_AUTO_SCHEME_PARALLEL": "0"}
"""As its own error asks: of two schemes scored beside each other on one GPU, one ended in "Cannot
copy out of meta tensor"."""

SEQUENCES = 3
"""Of ours in a line of its text: it drops shorter lines and takes one sequence of each, and cannot
join lines of a file (`concat` there ends in "'list' object has no attribute 'shape'")."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=200, help="its own number of them")
    arguments = parser.parse_args()
    room = Room.of(arguments.model, arguments.budget_bpe)
    text = write_text(arguments, SEQUENCES)
    made = arguments.work.absolute() / "exported"
    shutil.rmtree(made, ignore_errors=True)
    bits = 8 * (room.searched_bytes - SCALARS * room.linears) / room.elements
    command = [arguments.python, JOB, arguments.model.absolute(), text, made, bits]
    command += [arguments.samples or SAMPLES, arguments.length or LENGTH]
    command += [arguments.iterations, arguments.device]
    log = arguments.work / f"{arguments.budget_bpe:g}.log"
    watched = watch([*map(str, command)], os.environ | ONE_BY_ONE, log)
    (config,) = made.rglob("config.json")
    keep(
        arguments,
        config.parent,
        watched,
        who="AutoRound AutoScheme",
        packages=("auto-round", "torch", "transformers", "compressed-tensors"),
        room=room,
    )


if __name__ == "__main__":
    main()
