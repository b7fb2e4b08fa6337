"""How much rows count in second moments: what gradients say of them, and what it changes."""

import pytest
import torch
from searchable import save_searchable, save_text

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import TokenPlan
from autoquant.measure import gradient
from autoquant.measure.session import open_session
from autoquant.measure.statistics import weighing
from autoquant.measure.statistics.moments import by_layer, collect_moments, is_held_out
from autoquant.model.binding import DenseSlot
from autoquant.model.live_weights import units_of
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.run.observer import Logged
from autoquant.source.source import open_source


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def session(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = open_source(save_searchable(request.param, folder / "model"))
    return open_session(
        source,
        [group for group in find_groups(source) if not group.closed],
        calibration=str(save_text(folder / "text")),
        tokens=TokenPlan(calibration=256, search=64, report=64, sequence_length=32),
        mode=ActivationMode.W4A4,
        device="cpu",
        trust_remote_code=False,
        observer=Logged(),
    )


def collected(session, folder):
    store = StatisticsStore(folder)
    split = session.splits["calibration"]
    collect_moments(session.scorer, split, session.quantized.groups, store, lambda: None)
    return store


def sequences(session):
    return [row[None] for batch in session.splits["calibration"].batches for row in batch]


def test_rows_weigh_what_the_models_own_backward_pass_says(session, tmp_path):
    """One graph of the whole model, without blocks and taps; sums of its rows in float64."""
    store = collected(session, tmp_path)
    slots = [
        slot
        for group, slot in session.quantized.slots
        if isinstance(slot, DenseSlot) and group.layer is not None
    ]
    rows, squares = {}, {}
    """Of each linear and sequence."""
    number = 0

    def hook(slot):
        def see(_, given, output):
            at = slot.name, number
            rows[at] = given[0].detach()[0]
            output.register_hook(lambda g: squares.update({at: g[0].float().square().sum(dim=-1)}))

        return see

    handles = [slot.module.register_forward_hook(hook(slot)) for slot in slots]
    model = session.quantized.model
    for number, tokens in enumerate(sequences(session)):
        states = model.get_input_embeddings()(tokens).detach().requires_grad_()
        logits = model(inputs_embeds=states, use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(number)
        logits.float().backward(gradient._factor(logits.detach().float(), generator))
    for handle in handles:
        handle.remove()
    numbers = range(number + 1)
    by_set = {}
    for slot in slots:
        by_set.setdefault(slot.input_scale_set, []).append(slot)
    for name, own in by_set.items():
        norms = torch.stack([sum(squares[s.name, n] for s in own).double().sqrt() for n in numbers])
        weights = norms / norms.mean()
        found = store.rows()[name]
        assert torch.allclose(found.values.double(), weights.flatten(), rtol=0.05, atol=0.05), name
        expected = torch.zeros(2, *2 * (own[0].linears[0].in_features,), dtype=torch.float64)
        for n, of_rows in enumerate(weights):
            x = rows[own[0].name, n].double()
            expected[int(is_held_out(n))] += (x * of_rows[:, None]).mT @ x
        layer = next(g.layer for g, s in session.quantized.slots if s is own[0])
        ((unit, _),) = units_of(own[0], layer)
        sums = store.moments(unit).sums[:, 0].double()
        assert (sums - expected).norm() < 0.03 * expected.norm(), name


def test_the_mean_weight_is_one(session, tmp_path):
    for own in collected(session, tmp_path).rows().values():
        assert abs(own.values.mean().item() - 1) < 1e-4
        assert own.values.std() > 0.1


def test_each_expert_has_weights_for_the_rows_that_it_is_sent(session, tmp_path):
    store = collected(session, tmp_path)
    stacks = [own for own in store.rows().values() if own.rows.shape[1] > 1]
    assert bool(stacks) == any(not isinstance(s, DenseSlot) for _, s in session.quantized.slots)
    for own in stacks:
        assert own.rows.sum(dim=1).tolist() == [2 * 32] * len(sequences(session))
        assert own.rows.sum() == len(own.values)


@pytest.mark.parametrize("changed", ["waves", "one stage"])
def test_neither_waves_nor_stages_change_a_bit(session, tmp_path, changed, monkeypatch):
    whole = collected(session, tmp_path / "whole").rows()
    if changed == "waves":
        monkeypatch.setattr(session.scorer.room, "walk_bytes", 1)
    else:
        monkeypatch.setattr(session.scorer.trunk, "is_whole", True)
    other = collected(session, tmp_path / "other").rows()
    assert whole.keys() == other.keys()
    for name, own in whole.items():
        assert torch.equal(own.rows, other[name].rows)
        assert torch.equal(own.values, other[name].values), name


def test_sequences_of_a_chunk_keep_their_rows(session, monkeypatch):
    """With a pull that each sequence has to itself, it matters not who goes along."""
    monkeypatch.setattr(weighing, "random_pull", lambda *_: lambda hidden: hidden)
    groups = by_layer(session.quantized.groups)
    own, told = sequences(session), []
    alone = weighing.weigh_rows(session.scorer, own, groups, lambda: told.append(None))
    assert len(told) == len(own)
    monkeypatch.setattr(weighing, "_chunks", lambda *_: [torch.cat(own[:5]), torch.cat(own[5:])])
    together = weighing.weigh_rows(session.scorer, own, groups, lambda: None)
    assert alone.keys() == together.keys()
    for name, weights in alone.items():
        assert torch.equal(weights.rows, together[name].rows)
        assert torch.allclose(weights.values, together[name].values, rtol=0.05, atol=0.02), name


def test_weights_of_a_matrix_are_found_by_its_place():
    squares = [
        {0: torch.tensor([1.0, 4.0]), 2: torch.tensor([9.0])},
        {2: torch.tensor([16.0, 25.0])},
    ]
    own = RowWeights.of_squares(squares)
    assert own.rows.tolist() == [[2, 0, 1], [0, 0, 2]]
    assert torch.allclose(own.values * 3, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.allclose(own.of(1, 2) * 3, torch.tensor([4.0, 5.0]))
    assert len(own.of(1, 0)) == 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_that_say_nothing_give_no_weights(value):
    assert RowWeights.of_squares([{0: torch.full((3,), value)}]) is None


def test_a_model_without_a_backward_pass_has_all_rows_alike(session, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel\nof this kind")

    monkeypatch.setattr(weighing, "random_pull", fail)
    store = collected(session, tmp_path / "none")
    assert store.rows() == {}
    assert store.why_alike() == "no kernel"
    alike = StatisticsStore(tmp_path / "alike")
    alike.write_rows({}, "asked for")
    monkeypatch.undo()
    collected(session, tmp_path / "alike")
    for layer in range(2):
        assert store.digest(layer) == alike.digest(layer)
