"""The comparison of samplers says what its files hold."""

import json
from pathlib import Path

from experiments.ablation.samplers_summary import reached, table

ABLATION = Path(__file__).parents[2] / "experiments" / "ablation"


def rows(sampler, kl, *, forwards=30, measured=12):
    best = {"part": sampler, "forwards": forwards, "measured": measured}
    return [
        {**best, "search_kl": kl, "fresh_kl": 2 * kl},
        {"part": f"{sampler}, confirmed", "forwards": forwards, "search_kl": 1.0, "fresh_kl": 3.0},
    ]


def test_the_read_me_has_the_table_of_the_results():
    results = sorted((ABLATION / "results" / "samplers").glob("*.json"))
    found = reached(json.loads(path.read_text()) for path in results)
    assert table(found) in (ABLATION / "README.md").read_text()


def test_a_sampler_is_read_off_at_its_most_forwards_over_the_optimum_of_its_seed():
    optimum = {"part": "optimum", "search_kl": 2.0, "fresh_kl": 4.0}
    first = [optimum, *rows("tpe", 9.0, forwards=15), *rows("tpe", 1.0)]
    second = [optimum, *rows("tpe", 4.0, measured=40)]
    results = [{"subject": "tiny", "rows": own} for own in (first, second)]
    ((name, own),) = reached(results).items()
    assert name == ("tiny, 30", "tpe")
    assert own.measured == [12, 40]
    assert own.search == [0.5, 2.0]
    assert own.fresh == [0.5, 2.0]
    assert own.confirmed == [0.75, 0.75]
    line = table({name: own}).splitlines()[-1]
    assert line == "| tiny, 30 | `tpe` | 2 | 12 to 40 | 1.000 | 1.000 | 0.750 |"
