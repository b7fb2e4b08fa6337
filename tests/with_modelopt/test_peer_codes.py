"""ModelOpt's search with the codes of a preset that fits weights otherwise than by `max`."""

import pytest
from searchable import save_searchable, save_text

from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import TokenPlan
from autoquant.formats import BF16, Choice
from autoquant.measure.calibration import calibrate
from autoquant.measure.session import open_session
from autoquant.measure.statistics.moments import collect_moments
from autoquant.modelopt.peer import Peer
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.observer import Logged
from autoquant.source.source import open_source

pytestmark = pytest.mark.slow
CODES = Choice.parse("nvfp4/max/gptq")
TOKENS = TokenPlan(
    calibration=512, search=256, report=256, sequence_length=32, batch_tokens=128, seed=0
)


@pytest.mark.parametrize(
    ("kind", "mode"), [("llama", ActivationMode.W4A16), ("qwen3_moe", ActivationMode.W4A4)]
)
def test_its_scores_are_the_kl_of_each_group_in_these_codes(tmp_path, kind, mode):
    """ModelOpt's `kl_div` is the sum over the tokens that a probe takes the mean of."""
    plan = make_plan(open_source(save_searchable(kind, tmp_path / "model")), load_space("default"))
    groups = [g for g in plan.groups if plan.options.choices[g.name] != (BF16,)]
    statistics = StatisticsStore(tmp_path / "statistics")
    session = open_session(
        plan.source,
        groups,
        calibration=str(save_text(tmp_path / "text")),
        tokens=TOKENS,
        mode=mode,
        device="cpu",
        trust_remote_code=False,
        codes=CodeCache(tmp_path / "codes", made_from=plan.source.digest, most_bytes=1 << 30),
        statistics=statistics,
        observer=Logged(),
    )
    split = session.splits["calibration"]
    calibration = calibrate(session.scorer, split, lambda: None)
    session.quantized.set_input_scales(calibration.scales())
    collect_moments(session.scorer, split, groups, statistics, lambda: None)

    peer = Peer(plan, session, "kl_div", CODES)
    search, compared = session.splits["search"], 0
    for stats in peer.state["candidate_stats"].values():
        found = {peer.group_of.get(module) for module in stats["module_names"]}
        if found <= {group.name for group in groups}:
            (name,) = found
            theirs = stats["scores"][0]
            ours = session.scorer.score(Assignment.of({name: CODES}), search).mean
            assert theirs == pytest.approx(ours * search.tokens, rel=0.1)
            compared += 1
    assert compared == len(groups)
