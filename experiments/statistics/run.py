"""False gains of a paired comparison when sequences of a document resemble each other.

python -m experiments.statistics.run --out experiments/statistics/results/false_gains.json

Two candidates that are equally good are compared on simulated documents. The difference of their KL
on a sequence is sqrt(r) times a number of its document plus sqrt(1 - r) times a number of its own,
so that sequences of a document are correlated by r. A comparison errs where its 95 % interval puts
the difference below zero: nominally in 2.5 % of simulations. Documents have eight sequences each,
or as many as those of the bundled model's report tokens. The numbers are normal, of heavy tails
(Student's t with three degrees of freedom), or skewed (a lognormal less its mean).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from autoquant.arrays import Floats
from autoquant.measure.kl import TokenKl
from autoquant.search.confirm import CONFIDENCE, paired_difference

RESAMPLES = 1000
"""Of each simulated comparison; a search takes ten thousand."""

LIKE_REPORT = (2, 2, 3, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 12, 16, 16, 16, 16, 16, 16, 24, 24)
"""Sequences of the 24 documents of the bundled model's report tokens, in order of size."""

SIGMA = 0.8
"""Of the lognormal: its skewness is 3.7."""

Draw = Callable[[np.random.Generator, int], Floats]

DRAWS: dict[str, Draw] = {
    "normal": lambda generator, size: generator.standard_normal(size),
    "heavy tails": lambda generator, size: generator.standard_t(3, size) / np.sqrt(3),
    "skewed": lambda generator, size: _shifted_lognormal(generator, size),
}
"""Numbers of mean zero and variance one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=4000, help="of each cell")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cells = [
        cell(*design, simulations=arguments.simulations, seed=seed)
        for seed, design in enumerate(designs())
    ]
    result = {"simulations": arguments.simulations, "resamples": RESAMPLES, "cells": cells}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cells))


def designs() -> list[tuple[str, tuple[int, ...], float]]:
    """Kind of numbers, sequences of each document, correlation inside documents."""
    equal = [(8,) * documents for documents in (8, 16, 32, 64)]
    found = [("normal", sizes, r) for sizes in equal for r in (0.0, 0.1, 0.2, 0.3)]
    found += [(kind, LIKE_REPORT, r) for kind in DRAWS for r in (0.0, 0.3)]
    found += [(kind, sizes, 0.3) for kind in ("heavy tails", "skewed") for sizes in equal]
    return found


def cell(
    kind: str, sizes: tuple[int, ...], correlation: float, *, simulations: int, seed: int
) -> dict[str, Any]:
    """The shares of simulations in which each interval sees a gain that is none."""
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(sizes)), sizes)
    sequence = np.arange(len(document))
    nothing = TokenKl(kl=np.zeros(len(document)), sequence=sequence, unit=document)
    gains = dict.fromkeys(
        ("sequences, percentile", "documents, percentile", "documents, bootstrap-t"), 0
    )
    for number in range(simulations):
        shared = DRAWS[kind](generator, len(sizes))[document]
        own = DRAWS[kind](generator, len(document))
        kl = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        found = TokenKl(kl=kl, sequence=sequence, unit=document)
        gains["documents, bootstrap-t"] += paired_difference(
            found, nothing, seed=number, resamples=RESAMPLES
        ).is_gain
        gains["documents, percentile"] += percentile_bound(kl, document, number) < 0
        gains["sequences, percentile"] += percentile_bound(kl, sequence, number) < 0
    return {
        "numbers": kind,
        "documents": len(sizes),
        "sequences": len(document),
        "correlation": correlation,
        "false_gains": {name: count / simulations for name, count in gains.items()},
    }


def percentile_bound(kl: Floats, unit: np.ndarray, seed: int) -> float:
    """The upper bound of the percentile bootstrap over units, which ignores how few they are."""
    sums, sizes = np.bincount(unit, kl), np.bincount(unit)
    picks = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    return float(np.quantile(means, 1.0 - (1.0 - CONFIDENCE) / 2))


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown; false gains in per cent."""
    names = list(cells[0]["false_gains"])
    lines = [
        "| numbers | documents | sequences | correlation | " + " | ".join(names) + " |",
        "|---|" + "---:|" * (3 + len(names)),
    ]
    for row in cells:
        head = [row[name] for name in ("numbers", "documents", "sequences", "correlation")]
        rates = [f"{100 * rate:.1f}" for rate in row["false_gains"].values()]
        lines.append("| " + " | ".join(map(str, head + rates)) + " |")
    return "\n".join(lines)


def _shifted_lognormal(generator: np.random.Generator, size: int) -> Floats:
    variance = SIGMA**2
    spread = np.sqrt((np.exp(variance) - 1) * np.exp(variance))
    return (generator.lognormal(0.0, SIGMA, size) - np.exp(variance / 2)) / spread


if __name__ == "__main__":
    main()
