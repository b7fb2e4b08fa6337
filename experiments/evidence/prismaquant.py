"""PrismaQuant's own pipeline, unchanged, at the bytes of one of our budgets.

    pip install prismaquant==0.16.2
    python -m experiments.evidence.prismaquant MODEL --text TEXT --budget-bpe 5.0 \
        --work runs/peers/prismaquant --out runs/peers/prismaquant-5.0

Its `run-pipeline.sh` runs with a byte budget (`TARGET_DISK_GB`), with which it measures the KL of
several assignments and exports the best that fits. Two things are added to its defaults, both in
its favour: finer steps of its sweep below the budget, since it does not fill a budget between two
steps, and a model profile for Llama (`llama.json`), written as its registry says. Budgets that
share `--work` share the probe and the costs; each is charged with them.

It runs on CUDA alone, and takes no work folder under /tmp.
"""

import argparse
import os
import shutil
from pathlib import Path

from autoquant.decimals import shortest
from experiments.evidence.peers import Room, add_arguments, ask, keep, watch, write_text

PACKAGE = "prismaquant"
PROFILE = Path(__file__).with_name("llama.json")

SWEEP = (4.5, 4.6, 4.7, 4.75, 4.85, 5.0, 5.25, 5.5, 6.0, 7.0, 8.25)
"""Its own steps, in bits per element of the searched layers."""
FINER = (0.0, 0.01, 0.02, 0.04, 0.08)
"""Steps below the budget, likewise."""

RESERVE = 16 << 20
"""Bytes that its budget of the whole folder has for everything beside tensors: at least those of
the tokenizer and of its ship card."""

SOLVED, DONE = "[pipeline] [3/4] running allocator", "[pipeline] done."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    room = Room.of(arguments.model, arguments.budget_bpe)
    package = Path(ask(arguments.python, f"import {PACKAGE}; print({PACKAGE}.__path__[0])"))
    _add_profile(arguments, package)
    work = arguments.work.absolute()
    text = write_text(arguments)
    shutil.rmtree(work / "exported", ignore_errors=True)
    watched = watch(
        ["bash", str(package / "run-pipeline.sh")],
        _environment(arguments, room, text),
        work / f"{arguments.budget_bpe:g}.log",
        (SOLVED, DONE),
    )
    first = work / "seconds-before-solving.txt"
    shared = float(first.read_text()) - watched.marks[SOLVED] if first.exists() else 0.0
    if not first.exists():
        first.write_text(str(watched.marks[SOLVED]))
    keep(
        arguments,
        work / "exported",
        watched,
        who="PrismaQuant",
        packages=(PACKAGE, "torch", "transformers", "compressed-tensors"),
        room=room,
        shared_seconds=shared,
    )


def _add_profile(arguments: argparse.Namespace, package: Path) -> None:
    """Put the profile of the model's family beside those that the package has."""
    found = ask(
        arguments.python,
        "from prismaquant.model_profiles import detect_profile; "
        f"print(detect_profile({str(arguments.model.absolute())!r}).name)",
    )
    if found == "default":
        shutil.copy(PROFILE, package / "model_profiles" / "specs")


def _environment(arguments: argparse.Namespace, room: Room, text: Path) -> dict[str, str]:
    bits = 8 * room.searched_bytes / room.elements
    steps = sorted({*SWEEP, *(round(bits - step, 4) for step in FINER)})
    python = Path(arguments.python).absolute()
    asked = {
        "MODEL_PATH": arguments.model.absolute(),
        "WORK_DIR": arguments.work.absolute(),
        "DATASET": text,
        "DEVICE": arguments.device,
        "EXPORT_DEVICE": arguments.device,
        "TARGET_DISK_GB": f"{(room.checkpoint_bytes + RESERVE) / 1e9:.9f}",
        "ARTIFACT_OVERHEAD_RESERVE_BYTES": RESERVE,
        "PARETO_TARGETS": ",".join(map(shortest, steps)),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        # On a GPU compressed-tensors 0.20.1 has no kernel for its FP8: "Unsupported quantization
        # strategy: token". Its plain implementation has.
        "CT_ENFORCE_EAGER": 1,
    }
    if arguments.samples:
        asked["NSAMPLES"] = arguments.samples
    if arguments.length:
        asked["SEQLEN"] = arguments.length
    return os.environ | {name: str(value) for name, value in asked.items()}


if __name__ == "__main__":
    main()
