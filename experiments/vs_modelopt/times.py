"""Seconds of searches and of ModelOpt's `auto_quantize` on the same tokens, one after the other.

    python -m experiments.vs_modelopt.times --subject reference --out FILE

One subject, its first budget, nothing else on the machine. ModelOpt's scoring is
`estimate_sensitivity_scores`; its fake quantization runs through AutoQuant's kernels.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

from autoquant.api import search
from autoquant.data.tokens import TokenPlan
from autoquant.modelopt.peer import METHODS, Peer
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import MAX_ONLY, Subject, add_arguments, subject

SEARCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "max only": {"space": str(MAX_ONLY)},
    "exact probes": {"probe": "exact"},
    "gradient, no trials": {"probe": "gradient", "trials": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--search-tokens", type=int, default=TokenPlan().search)
    parser.add_argument("--report-tokens", type=int, default=TokenPlan().report)
    parser.add_argument("--searches", nargs="*", choices=SEARCHES, default=list(SEARCHES))
    arguments = parser.parse_args()
    chosen = subject(arguments.subject, arguments.models, arguments.texts)
    tokens = TokenPlan(
        search=arguments.search_tokens, report=arguments.report_tokens, seed=arguments.seed
    )
    result = record.provenance(arguments.commit) | {
        "subject": chosen.name,
        "budget_bpe": chosen.bpes[0],
        "groups": None,
        "tokens": {"search": arguments.search_tokens, "report": arguments.report_tokens},
        "modelopt": {},
        "autoquant": {},
    }
    for name in arguments.searches:
        out = arguments.work / f"times-{chosen.name}-{name.replace(', ', '-').replace(' ', '-')}"
        result["autoquant"][name] = searched(chosen, SEARCHES[name], out, arguments)
        record.write(arguments.out, result)
    bench = Bench(chosen, "default", tokens, arguments.device)
    result["groups"] = len(bench.plan.accounting.searched)
    for method in METHODS:
        peer = Peer(bench.plan, bench.session, method)
        list(peer.choices(bench.unmeasured_problem(chosen.bpes[0])))
        result["modelopt"][method] = peer.seconds
        record.write(arguments.out, result)


def searched(
    chosen: Subject, settings: dict[str, Any], out: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    """Seconds by stage of one search from nothing."""
    run = search(
        str(chosen.path),
        budget_bpe=chosen.bpes[0],
        budget_scope=str(chosen.scope),
        calibration=str(chosen.text),
        search_tokens=arguments.search_tokens,
        report_tokens=arguments.report_tokens,
        seed=arguments.seed,
        device=arguments.device,
        mlflow=False,
        export=False,
        resume=False,
        out=out,
        **settings,
    )
    assert run.result is not None
    seconds: dict[str, float] = run.result["seconds"]
    print(f"{out.name}: {seconds['total']:.1f} s", flush=True)
    return seconds


if __name__ == "__main__":
    main()
