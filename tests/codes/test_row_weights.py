"""How much rows count in second moments: what gradients say of them, and what it changes."""

from types import SimpleNamespace

import pytest
import torch
from searchable import save_searchable, save_text

from autoquant.codes.row_weights import RowWeights
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import TokenPlan
from autoquant.forward.backward import Backward
from autoquant.measure import gradient
from autoquant.measure.compare import Ahead
from autoquant.measure.session import open_session
from autoquant.measure.statistics import chunks, moments, weighing
from autoquant.measure.statistics.chunks import Chunk, chunks_of, is_held_out
from autoquant.measure.statistics.moments import collect_moments, steps_of, take_along
from autoquant.measure.statistics.weighing import by_layer, input_sets
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


def collected(session, folder, advance=lambda: None):
    store = StatisticsStore(folder)
    split = session.splits["calibration"]
    collect_moments(session.scorer, split, session.quantized.groups, store, advance)
    return store


def weights_of(session, store):
    return store.rows(input_sets(session.quantized.groups))


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
        found = weights_of(session, store)[name]
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
    for own in weights_of(session, collected(session, tmp_path)).values():
        assert abs(own.values.mean().item() - 1) < 1e-4
        assert own.values.std() > 0.1


def test_each_expert_has_weights_for_the_rows_that_it_is_sent(session, tmp_path):
    store = collected(session, tmp_path)
    stacks = [own for own in weights_of(session, store).values() if own.rows.shape[1] > 1]
    assert bool(stacks) == any(not isinstance(s, DenseSlot) for _, s in session.quantized.slots)
    for own in stacks:
        assert own.rows.sum(dim=1).tolist() == [2 * 32] * len(sequences(session))
        assert own.rows.sum() == len(own.values)


@pytest.mark.parametrize("changed", ["waves", "one stage", "one pass", "along", "too much along"])
def test_nothing_but_the_tokens_changes_a_bit(session, tmp_path, changed, monkeypatch):
    scorer, split = session.scorer, session.splits["calibration"]
    collected(session, tmp_path / "whole")
    if changed == "waves":
        monkeypatch.setattr(scorer.room, "walk_bytes", 1)
    elif changed == "one stage":
        monkeypatch.setattr(scorer.trunk, "is_whole", True)
    else:
        monkeypatch.setattr(scorer.room, "is_streamed", True)
        monkeypatch.setattr(moments, "row_weights", None)
    if changed.endswith("along"):
        states = (1 + scorer.trunk.stages) * 256 * 2 * scorer.trunk.head.weight.shape[1]
        monkeypatch.setattr(scorer.room, "walk_bytes", states - (changed != "along"))
        take_along(scorer, split, None)
        assert len(scorer.along) == (8 if changed == "along" else 0)
        [*scorer.forward([split.batches[0][:1]])]
        assert all(flow.is_done for flow in scorer.along)
    told = []
    collected(session, tmp_path / "other", lambda: told.append(None))
    assert len(told) == steps_of(scorer, split)
    assert not scorer.along
    whole, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("whole", "other")
    )
    assert whole.keys() == other.keys()
    for name, content in whole.items():
        assert content == other[name], name


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_a_kill_has_left_out_are_made(session, tmp_path, streamed, monkeypatch):
    """One pass keeps the moments of all blocks before the weights."""
    monkeypatch.setattr(session.scorer.room, "is_streamed", streamed)
    collected(session, tmp_path)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "rows.safetensors").unlink()
    collected(session, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_nothing_that_went_along_is_held_where_all_is_kept(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session.scorer.room, "is_streamed", True)
    collected(session, tmp_path)
    take_along(session.scorer, session.splits["calibration"], None)
    assert session.scorer.along
    collected(session, tmp_path)
    assert not session.scorer.along


def test_what_goes_along_leaves_room_for_what_goes_ahead(session, monkeypatch):
    scorer = session.scorer
    monkeypatch.setattr(scorer.room, "is_streamed", True)
    width = 2 * scorer.trunk.head.weight.shape[1]
    ahead = Ahead(split=session.splits["search"], batches=(0,), with_noise=False)
    needed = width * (256 + scorer.trunk.stages * (256 + 64))
    for spare, taken in ((0, 8), (-1, 0)):
        monkeypatch.setattr(scorer.room, "walk_bytes", needed + spare)
        monkeypatch.setattr(scorer, "along", ())
        take_along(scorer, session.splits["calibration"], ahead)
        assert len(scorer.along) == taken


def test_sequences_of_a_chunk_keep_their_rows(session, monkeypatch, tmp_path):
    """With a pull that each sequence has to itself, it matters not who goes along."""
    monkeypatch.setattr(weighing, "random_pull", lambda *_: lambda hidden: hidden)
    groups, told = by_layer(session.quantized.groups), []
    alone = chunks_of(session.scorer, session.splits["calibration"])
    assert [(own.first, len(own.tokens)) for own in alone] == [(n, 1) for n in range(8)]
    own = sequences(session)
    joined = [Chunk(torch.cat(own[:5]), 0), Chunk(torch.cat(own[5:]), 5)]
    one, other = (
        weighing.weigh_rows(session.scorer, chunks, groups, lambda: told.append(None))
        for chunks in (alone, joined)
    )
    assert len(told) == 8 + 2
    assert one.keys() == other.keys()
    for name, weights in one.items():
        assert torch.equal(weights.rows, other[name].rows)
        assert torch.allclose(weights.values, other[name].values, rtol=0.05, atol=0.02), name
    found = collected(session, tmp_path / "alone")
    monkeypatch.setattr(moments, "chunks_of", lambda *_: joined)
    both = collected(session, tmp_path / "joined")
    for group, slot in session.quantized.slots:
        for unit, _ in units_of(slot, group.layer):
            sums, others = found.moments(unit).sums, both.moments(unit).sums
            assert (sums - others).norm() < 0.05 * sums.norm(), unit.name


def test_chunks_on_a_gpu_are_bounded(session, monkeypatch):
    split = session.splits["calibration"]
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(session.scorer, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *_: own)

    def sizes():
        return [len(own.tokens) for own in chunks_of(session.scorer, split)]

    assert sizes() == [3, 3, 2]
    monkeypatch.setattr(session.scorer.room, "graphs_at_once", 2)
    assert sizes() == [2, 2, 2, 2]


def test_weights_of_a_matrix_are_found_by_its_place():
    sizes = weighing.Sizes(2)
    for sequence, matrix, squares in (
        (0, 2, [9.0]),
        (0, 0, [0.5, 3.0]),
        (0, 0, [0.5, 1.0]),
        (0, 0, [7.0]),
        (1, 1, [16.0, 25.0]),
    ):
        sizes.add("set", sequence, matrix, torch.tensor(squares))
    sizes.settle()
    own = sizes.weights()["set"]
    assert own.rows.tolist() == [[2, 0, 1], [0, 2, 0]]
    assert torch.allclose(own.values * 3, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.allclose(own.of(1, 1) * 3, torch.tensor([4.0, 5.0]))
    assert len(own.of(1, 0)) == len(own.of(1, 2)) == 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_that_say_nothing_give_no_weights(value):
    assert RowWeights.of_squares([(torch.full((3,), value), (3,))]) is None


def test_a_model_without_a_backward_pass_has_all_rows_alike(session, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel\nof this kind")

    monkeypatch.setattr(weighing, "random_pull", fail)
    store = collected(session, tmp_path / "none")
    assert weights_of(session, store) == {}
    assert store.why_alike() == "no kernel"
    alike = StatisticsStore(tmp_path / "alike")
    alike.count_alike("asked for")
    monkeypatch.undo()
    collected(session, tmp_path / "alike")
    for layer in range(2):
        sets = input_sets(own for own in session.quantized.groups if own.layer == layer)
        assert store.digest(layer, sets) == alike.digest(layer, sets) is not None


@pytest.mark.parametrize("streamed", [False, True])
def test_groups_may_be_weighed_one_after_another(session, tmp_path, streamed, monkeypatch):
    """An assignment of some groups is measured, and later one of others in the same blocks."""
    monkeypatch.setattr(session.scorer.room, "is_streamed", streamed)
    split, groups = session.splits["calibration"], session.quantized.groups
    whole = collected(session, tmp_path / "whole")
    store = StatisticsStore(tmp_path / "parts")
    for own in (groups[:1], groups[1:], groups):
        collect_moments(session.scorer, split, own, store, lambda: None)
    for group in groups:
        own = group.layer, group.input_sets
        assert store.digest(*own) == whole.digest(*own) is not None, group.name
    one, other = (weights_of(session, found) for found in (store, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].values, own.values) for name, own in other.items())
    assert store.rows(["unheard of"]) is None


@pytest.mark.parametrize("step", ["count_alike", "write"])
def test_gradients_that_end_halfway_weigh_nothing(session, tmp_path, step, monkeypatch):
    """Also where a kill comes between: blocks that they have reached are not kept."""

    def visit(back, stage):
        if not stage:
            raise RuntimeError("no kernel")
        return seen(back, stage)

    def die(store, *given):
        done(store, *given)
        if store.why_alike() is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(session.scorer.room, "is_streamed", True)
    seen, done = Backward.visit, getattr(StatisticsStore, step)
    monkeypatch.setattr(Backward, "visit", visit)
    with monkeypatch.context() as killed:
        killed.setattr(StatisticsStore, step, die)
        with pytest.raises(KeyboardInterrupt):
            collected(session, tmp_path / "halfway")
    store = collected(session, tmp_path / "halfway")
    alike = StatisticsStore(tmp_path / "alike")
    alike.count_alike("asked for")
    collected(session, tmp_path / "alike")
    for group in session.quantized.groups:
        own = group.layer, group.input_sets
        assert store.digest(*own) == alike.digest(*own) is not None, group.name


def test_sets_of_which_gradients_say_nothing_are_told_from_those_not_weighed(tmp_path):
    store, own = StatisticsStore(tmp_path), RowWeights.of_squares([(torch.ones(2), (2,))])
    assert store.unreached(["a", "b"]) == []
    store.write_rows({"a": own}, ["a", "b"])
    store.write_rows({}, ["c"])
    assert store.unreached(["a", "b", "c", "d"]) == ["b", "c"]
    assert store.rows(["a", "c"]).keys() == {"a"}
    store.count_alike("no kernel")
    assert store.unreached(["a", "b"]) == []
    assert store.rows(["a", "d"]) == {}


def test_matrices_that_no_gradient_reaches_have_no_weights():
    own = RowWeights.of_squares([(torch.ones(2), (2,)), (torch.ones(3), (3,))])
    assert [len(own.of(sequence, 0)) for sequence in (0, 1)] == [2, 3]
    assert [len(own.of(sequence, 1)) for sequence in (0, 1)] == [0, 0]
