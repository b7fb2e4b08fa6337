"""One pass over the blocks serves many forwards, and each ends as it would alone."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from searchable import save_searchable

from autoquant.codes.held import Weights
from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.formats import FP8, NVFP4
from autoquant.formats.packed import Packed
from autoquant.measure.calibration import calibrate
from autoquant.measure.evaluator import Request
from autoquant.measure.gradient import gradient_probe
from autoquant.measure.race import Race
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.measure.scorer import Scorer
from autoquant.measure.sensitivity import probe
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.model.streaming.placement import Allowance
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 200, (3, 4, 16), generator=torch.Generator().manual_seed(0))
SPLIT = Split.unrelated("search", tuple(TOKENS), digest="search")
EVERY = range(3)


@pytest.fixture(
    scope="module", params=["llama", pytest.param("minimax_m2", marks=pytest.mark.slow)]
)
def folder(request, tmp_path_factory):
    return save_searchable(
        request.param, tmp_path_factory.mktemp(request.param) / "source", num_hidden_layers=4
    )


def scorer_of(folder):
    groups = find_groups(open_source(folder))
    quantized = QuantizedModel(load_model(folder, CPU).model, groups, mode=ActivationMode.W4A4)
    scorer = Scorer(quantized, CPU)
    quantized.set_input_scales(calibrate(scorer, SPLIT, lambda: None).scales())
    return scorer


@pytest.fixture(scope="module")
def scorer(folder):
    return scorer_of(folder)


@pytest.fixture
def passes(scorer, monkeypatch):
    """The blocks in the order in which their weights were opened; encoding opens one again."""
    opened, block = [], scorer.trunk.weights.block

    @contextmanager
    def counted(layer):
        if layer is not None and opened[-1:] != [layer]:
            opened.append(layer)
        with block(layer) as weights:
            yield weights

    monkeypatch.setattr(scorer.trunk.weights, "block", counted)
    return opened


def keys_of(scorer):
    return [(group.name, choice) for group in scorer.quantized.groups for choice in (NVFP4, FP8)]


def assignments_of(scorer):
    """From the first block on, from the third on, in the last block, in the head, in none."""
    names = [group.name for group in scorer.quantized.groups]
    later = [g.name for g in scorer.quantized.groups if g.layer is not None and g.layer >= 2]
    return [
        Assignment.of(dict.fromkeys(names, NVFP4)),
        Assignment.of(dict.fromkeys(names, NVFP4) | dict.fromkeys(later, FP8)),
        Assignment.of({later[-1]: FP8}),
        Assignment.of({"lm_head": NVFP4}),
        Assignment.of({}),
    ]


def test_assignments_and_batches_in_one_pass_score_as_each_alone(scorer, passes):
    assignments = assignments_of(scorer)
    together = scorer.score_batches([assignments] * len(EVERY), SPLIT, EVERY)
    assert passes == [0, 1, 2, 3]
    for number, assignment in enumerate(assignments):
        alone = scorer.score(assignment, SPLIT).kl
        assert np.array_equal(np.concatenate([b[number].kl for b in together]), alone)
    assert together[0][0].mean > 0.0


def test_a_candidate_starts_where_it_leaves_another_of_the_same_pass(scorer, monkeypatch):
    first, second, *_ = assignments_of(scorer)
    scorer.score(Assignment.of({}), SPLIT)
    ran, advance = [], scorer.trunk.advance

    def counted(stage, part, state):
        ran.append(stage)
        return advance(stage, part, state)

    monkeypatch.setattr(scorer.trunk, "advance", counted)
    scorer.score_batches([[first, second]], SPLIT, [0])
    assert ran == [0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("most", [1, 5, 10_000])
def test_probes_do_not_depend_on_how_many_go_together(folder, scorer, most):
    other = scorer_of(folder)
    other.room.most_together = most
    keys = keys_of(scorer)
    wanted = [(batch, key) for batch in EVERY for key in keys]
    for found, alone in zip(other.probe(SPLIT, wanted), scorer.probe(SPLIT, wanted), strict=True):
        assert np.array_equal(found.kl.kl, alone.kl.kl)


def test_all_probes_of_a_split_take_one_pass(folder, scorer, passes, monkeypatch):
    monkeypatch.setattr(scorer.room, "most_together", 10_000)
    list(scorer.probe(SPLIT, [(batch, key) for batch in EVERY for key in keys_of(scorer)]))
    assert passes == [0, 1, 2, 3]


def test_gradients_of_all_batches_take_two_passes_and_are_those_of_each(
    scorer, passes, monkeypatch
):
    keys = keys_of(scorer)
    alone = gradient_probe(scorer, SPLIT, keys, (), lambda _: None, seed=1)
    passes.clear()
    monkeypatch.setattr(scorer.room, "batches_together", 3)
    assert gradient_probe(scorer, SPLIT, keys, (), lambda _: None, seed=1) == alone
    assert passes == [0, 1, 2, 3, 2, 1, 0]


def test_a_model_in_one_stage_measures_the_same(folder, scorer):
    whole = scorer_of(folder)
    whole.trunk.is_whole = True
    whole.check(SPLIT)
    keys, assignments = keys_of(scorer), assignments_of(scorer)
    for assignment in assignments:
        assert np.array_equal(whole.score(assignment, SPLIT).kl, scorer.score(assignment, SPLIT).kl)
    assert probe(whole, SPLIT, keys, [], lambda _: None).kl == (
        probe(scorer, SPLIT, keys, [], lambda _: None).kl
    )
    estimates = [
        gradient_probe(each, SPLIT, keys, (), lambda _: None, seed=0) for each in (whole, scorer)
    ]
    assert estimates[0] == estimates[1]


@pytest.mark.parametrize("batches_together", [1, 2, 3])
def test_measurements_do_not_depend_on_what_goes_together(scorer, monkeypatch, batches_together):
    """Not even where a race is lost: what was measured behind it is not counted."""
    best, *rest = assignments_of(scorer)[::-1]
    rival = tuple(scorer.score(best, SPLIT).by_sequence())
    race = Race(rival=rival, fewest=2)
    requests = [Request(assignment=best), *(Request(assignment=a, race=race) for a in rest)]

    def measured(together):
        found = LocalEvaluator(scorer, SPLIT, together).measure(requests)
        return [{**m.to_dict(), "seconds": 0.0} for m in found]

    alone = measured(1)
    assert any(m["gap"] is not None and len(m["sequence_kl"]) < 12 for m in alone)
    monkeypatch.setattr(scorer.room, "batches_together", batches_together)
    assert measured(1) == measured(3) == measured(5) == alone


def test_blocks_that_return_their_state_in_a_tuple_are_stages(tmp_path):
    folder = save_searchable("falcon_h1", tmp_path / "source")
    groups = find_groups(open_source(folder))
    quantized = QuantizedModel(load_model(folder, CPU).model, groups, mode=ActivationMode.W4A4)
    scorer = Scorer(quantized, CPU)
    scorer.check(SPLIT)
    assert not scorer.trunk.is_whole


def test_forwards_with_the_same_weights_go_behind_each_other(folder, monkeypatch):
    """So where memory holds the weights of one block, each is decoded once for all of them."""
    loaded = load_model(folder, CPU, allowance=Allowance(weights=Weights.DISK))
    groups = find_groups(open_source(folder))
    quantized = QuantizedModel(
        loaded.model,
        groups,
        mode=ActivationMode.W4A4,
        decoded_bytes=0,
        packed_bytes=0,
        store=loaded.store,
    )
    scorer = Scorer(quantized, CPU)
    quantized.set_input_scales(calibrate(scorer, SPLIT, lambda: None).scales())
    decoded, decode = [], Packed.decode
    monkeypatch.setattr(Packed, "decode", lambda p, out=None: decoded.append(p) or decode(p, out))
    inside = [group for group in groups if group.layer is not None]
    both = [Assignment.of(dict.fromkeys([g.name for g in inside], c)) for c in (NVFP4, FP8)]
    scorer.score_batches([[*both, *both]] * len(EVERY), SPLIT, EVERY)
    units = sum(len(quantized.weights.units(group)) for group in inside)
    assert len(decoded) == quantized.book.encoded == 2 * units


def test_a_model_whose_own_forward_fails_is_refused(scorer, monkeypatch):
    def failing(self, *args, **kwargs):
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(type(scorer.quantized.model), "forward", failing)
    monkeypatch.setattr(scorer.trunk, "is_whole", False)
    with pytest.raises(SourceError, match=r"own forward of \w+ fails in BF16 .*same dtype"):
        scorer.check(SPLIT)
