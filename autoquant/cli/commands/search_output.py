"""The result of a search for people."""

import shlex
from pathlib import Path
from typing import Any

import click

from autoquant.cli.output import figure, print_fields, print_table
from autoquant.report.words import (
    best_baseline,
    budget_note,
    budgeted,
    clipped_inputs,
    counts_stored_bits,
    duration,
    exact,
    finding,
    fitted_codes,
    further_limits,
    polish,
    target_of,
    unit_of_budget,
)
from autoquant.store.run_directory import REPORT


def print_result(result: dict[str, Any], run: Path) -> None:
    """Print the verdict, the table of baselines, and the next command to type."""
    kl, counts, limits = result["kl"], result["counts"], "; ".join(further_limits(result))
    click.echo(f"{finding(result)}\n")
    print_fields(
        {
            "winner": f"{result['winner']['stage']}: {result['winner']['name']}",
            "BPE": f"{result['bpe']['checkpoint']:.4f} of the checkpoint "
            f"({result['bpe']['searched']:.4f} of the searched layers)",
            "budget": f"{exact(result['budget_bpe'])} {unit_of_budget(result)}, "
            f"of which it takes {budgeted(result):.4f}",
            **({"limits": limits} if limits else {}),
            "size": f"{result['checkpoint_bytes']:,} bytes",
            "groups": ", ".join(f"{n} {name}" for name, n in counts.items() if n),
            **({"codes": fitted_codes(result)} if fitted_codes(result) else {}),
            **({"polish": polish(result)} if polish(result) else {}),
            **({"inputs": clipped_inputs(result)} if clipped_inputs(result) else {}),
            "KL": f"{kl['mean']:.5f} +- {figure(kl['stderr'], '.5f')} nats per token, "
            f"median {kl['median']:.5f}, p99 {kl['p99']:.4f} ({target_of(result)}, "
            f"keys and values in {result['kv_cache'].upper()})",
            "top-1": f"{result['top1_agreement']:.2%} agree",
            "perplexity": f"{result['perplexity']['bf16']:.3f} in BF16, "
            f"{result['perplexity']['quantized']:.3f} quantized",
            "noise floor": f"{figure(result['noise_floor'], '.2g')} nats per token",
            **({"resolved": _resolved(result)} if result["resolution"] is not None else {}),
            "time": _times(result["seconds"]),
        }
    )
    click.echo()
    rows = [("this search", result["bpe"]["checkpoint"], kl["mean"], kl["stderr"], True)]
    rows += [(b["name"], b["bpe"], b["kl"], b["stderr"], b["fits"]) for b in result["baselines"]]
    print_table(
        ("assignment", "BPE", "KL", "+-", "in budget"),
        [
            (name, f"{bpe:.3f}", f"{mean:.5f}", figure(error, ".5f"), "yes" if fits else "no")
            for name, bpe, mean, error, fits in sorted(rows, key=lambda row: row[2])
        ],
    )
    if note := budget_note(result):
        click.echo(note)
    click.echo()
    if (run / REPORT).exists():
        click.echo(f"report:     {run / REPORT}")
    if "checkpoint" in result:
        click.echo(f"checkpoint: {result['checkpoint']}")
        click.echo(f"next:       autoquant verify {shlex.quote(result['checkpoint'])}")
    else:
        click.echo(f"next:       the same command with --export writes {run}/checkpoint")


def _resolved(result: dict[str, Any]) -> str:
    """What difference the report tokens tell from noise."""
    return (
        f"differences above {result['resolution']:.1%} of the KL, on "
        f"{result['tokens']['report']['tokens']:,} tokens that the search did not see"
    )


def print_frontier(found: list[tuple[dict[str, Any], Path]]) -> None:
    """Print a line for each budget, and the next command to type."""
    first, _ = found[0]
    taken = () if counts_stored_bits(first) else (unit_of_budget(first),)
    print_table(
        ("budget", *taken, "BPE", "KL", "+-", "best recipe in budget", "its KL", "size", "run"),
        [
            (
                exact(result["budget_bpe"]),
                *(f"{budgeted(result):.4f}" for _ in taken),
                f"{result['bpe']['checkpoint']:.4f}",
                f"{result['kl']['mean']:.5f}",
                figure(result["kl"]["stderr"], ".5f"),
                *_best_recipe(result),
                f"{result['checkpoint_bytes']:,} bytes",
                str(run),
            )
            for result, run in found
        ],
    )
    click.echo()
    runs = shlex.join(str(run) for _, run in found)
    click.echo(f"next:       autoquant compare {runs}")


def _times(seconds: dict[str, float]) -> str:
    """The whole time, and the stages that took a second or more of it."""
    stages = {name: spent for name, spent in seconds.items() if name != "total" and spent >= 1}
    parts = ", ".join(f"{name} {duration(spent)}" for name, spent in stages.items())
    return duration(seconds["total"]) + (f": {parts}" if parts else "")


def _best_recipe(result: dict[str, Any]) -> tuple[str, str]:
    best = best_baseline(result)
    return (best["name"], f"{best['kl']:.5f}") if best else ("-", "-")
