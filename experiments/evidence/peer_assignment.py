"""The assignment of ModelOpt's best preset at a budget, as a file that `autoquant evaluate` reads.

python -m experiments.evidence.peer_assignment PEERS.json --budget-bpe 5.0 --out modelopt.json
"""

import argparse
import json
from pathlib import Path

from autoquant.formats import Choice
from autoquant.plan.assignment import Assignment
from experiments.common import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", type=Path, help="as experiments.vs_modelopt.presets writes it")
    parser.add_argument("--budget-bpe", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cells = json.loads(arguments.peers.read_text(encoding="utf-8"))["cells"]
    (cell,) = [own for own in cells if own["budget_bpe"] == arguments.budget_bpe]
    best = min((row for row in cell["modelopt"].values() if row), key=lambda row: row["kl"])
    chosen = {name: Choice.parse(choice) for name, choice in best["groups"].items()}
    record.write(arguments.out, Assignment.of(chosen).to_dict())


if __name__ == "__main__":
    main()
