"""The script of the evidence: its figures are the files', and nothing that is worse is left out."""

import json
from pathlib import Path

import pytest

from experiments.evidence import summary
from experiments.evidence.summary import by_cell, geometric, kl_table, rows_of, worse_table

RESULTS = Path(summary.__file__).parents[1] / "vs_modelopt" / "results"


def of_presets(ours, peers, *, seed=0, mode="w4a16"):
    return {
        "subject": "model",
        "seed": seed,
        "mode": mode,
        "cells": [
            {
                "budget_bpe": 5,
                "modelopt": {
                    name: None
                    if kl is None
                    else {"kl": kl, "checkpoint_bytes": 1000, "seconds": 7.0}
                    for name, kl in peers.items()
                },
                "autoquant": {"kl": ours, "checkpoint_bytes": 990, "seconds": 3.0},
            }
        ],
    }


def test_ours_is_held_against_the_peer_that_is_best_with_each_seed():
    rows = [
        *rows_of(of_presets(0.1, {"a": 0.2, "b": 0.4})),
        *rows_of(of_presets(0.2, {"a": 0.8, "b": 0.25}, seed=1)),
    ]
    (found,) = by_cell(rows).values()
    assert next(iter(found)) == "AutoQuant"
    assert summary.ratios(found) == {
        0: (pytest.approx(0.5), "ModelOpt a"),
        1: (pytest.approx(0.8), "ModelOpt b"),
    }
    table = kl_table(rows)
    assert f"{geometric([0.5, 0.8]):.3f} (worst 0.800)" in table
    assert "| 990 | 3.0 |" in table
    assert "| 1,000 | 7.0 |" in table


def test_checkpoints_of_other_tools_are_peers_too():
    result = of_presets(0.1, {"a": 0.2})
    row = {"kl": 0.05, "checkpoint_bytes": 980, "seconds": 9.0}
    result["cells"][0]["peers"] = {"PrismaQuant": row}
    (found,) = by_cell(rows_of(result)).values()
    assert summary.ratios(found) == {0: (pytest.approx(2.0), "PrismaQuant")}
    assert "| 980 | 9.0 |" in kl_table(rows_of(result))


def test_a_peer_that_found_nothing_is_left_out():
    rows = list(rows_of(of_presets(0.1, {"a": None, "b": 0.2})))
    assert {row.who for row in rows} == {"AutoQuant", "ModelOpt b"}


def test_what_is_worse_needs_a_reason():
    rows = list(rows_of(of_presets(0.3, {"a": 0.2})))
    with pytest.raises(SystemExit, match=r"model w4a16 5 .* is 1\.500 of ModelOpt a"):
        worse_table(rows, {})
    assert "| model w4a16 5 | 0 | 1.500 | ModelOpt a | luck |" in worse_table(
        rows, {"model w4a16 5": "luck"}
    )
    assert "No cell" in worse_table(list(rows_of(of_presets(0.1, {"a": 0.2}))), {})


def test_modes_are_cells_of_their_own():
    rows = [
        *rows_of(of_presets(0.1, {"a": 0.2})),
        *rows_of(of_presets(0.1, {"a": 0.05}, mode="w4a4")),
    ]
    assert len(by_cell(rows)) == 2


def test_the_committed_results_give_their_own_summary():
    """The ratios that the searches wrote down themselves, to the last digit."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("babyllama-*.json"))]
    found = by_cell(row for result in results for row in rows_of(result))
    said = {
        (float(cell["budget_bpe"]), result["seed"]): cell["autoquant"]["all"]["to_peer"]["ratio"]
        for result in results
        for cell in result["cells"]
    }
    ours = {
        (cell[2], seed): ratio
        for cell, own in found.items()
        for seed, (ratio, _) in summary.ratios(own).items()
    }
    assert ours == pytest.approx(said)


def test_the_picture_is_drawn(tmp_path):
    rows = list(rows_of(of_presets(0.1, {"a": 0.2})))
    summary.draw(rows, tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_stands_with_its_interval():
    row = {
        "name": "winner",
        "bpe": 7.3,
        "kl": 0.4,
        "task": "hellaswag",
        "items": 400,
        "metric": "acc",
        "value": 0.25,
        "stderr": 0.02,
        "to_bf16": {"mean": -0.01, "low": -0.03, "high": 0.01},
    }
    table = summary.task_table([{"subject": "m", "budget_bpe": 5.0, "tasks": {"rows": [row]}}])
    assert "| m | 5 | winner | 7.300 | 0.40000 | hellaswag | acc | 0.2500 | 0.0200 " in table
    assert "| -0.0100 (-0.0300 to +0.0100) | 400 |" in table


def test_positions_stand_where_they_were_measured():
    assert summary.position_table([{"by_position": []}]) == ""
    buckets = [{"first": 0, "last": 31, "kl": 0.5}, {"first": 32, "last": 63, "kl": 0.25}]
    table = summary.position_table(
        [
            {
                "subject": "m",
                "budget_bpe": 5.0,
                "by_position": [{"name": "the winner", "buckets": buckets}],
            }
        ]
    )
    assert table.splitlines()[0].endswith("| 0 to 31 | 32 to 63 |")
    assert table.splitlines()[-1] == "| m | 5 | the winner | 0.50000 | 0.25000 |"
