"""The polish: what it pairs, that its codes are a better answer, and that nothing changes them."""

from dataclasses import replace

import pytest
import torch
from searchable import save_searchable, save_text

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import CodeCache
from autoquant.codes.held import Weights
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.weights import FileWeights
from autoquant.data.tokens import TokenPlan
from autoquant.errors import SourceError
from autoquant.formats import NVFP4, REFIT
from autoquant.measure.polish import drift, visitor
from autoquant.measure.session import open_session
from autoquant.measure.statistics.chunks import Chunk, chunks_of
from autoquant.measure.statistics.moments import collect_moments
from autoquant.measure.statistics.taps import InputTaps
from autoquant.model.inputs import InputScale
from autoquant.model.streaming.placement import Allowance
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.run.observer import Logged
from autoquant.source.source import open_source

REFITTED = replace(NVFP4, scale_rule="mse", rounding=REFIT)


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_searchable(request.param, folder / "model"), save_text(folder / "text")


def opened(place, folder, weights=Weights.RESIDENT, statistics=None):
    model, text = place
    source = open_source(model)
    session = open_session(
        source,
        [group for group in find_groups(source) if not group.closed],
        calibration=str(text),
        tokens=TokenPlan(calibration=1024, search=64, report=256, sequence_length=32),
        mode=ActivationMode.W4A4,
        device="cpu",
        allowance=Allowance(weights=weights),
        trust_remote_code=False,
        codes=CodeCache(folder, made_from=source.digest, most_bytes=1 << 30),
        statistics=statistics,
        observer=Logged(),
    )
    sets = {own.input_scale_set for group in session.quantized.groups for own in group.linears}
    session.quantized.set_input_scales({name: InputScale(amax=8.0) for name in sets})
    return source, session


def assignment_of(session):
    return Assignment.of({group.name: REFITTED for group in session.quantized.groups})


def polish(session, advance=lambda: None):
    session.quantized.use_polish("this")
    split = session.splits["calibration"]
    visitor.polish(session.scorer, split, assignment_of(session), advance)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def watching(monkeypatch):
    """What every input set showed in a polish: its moments and its drift."""
    watched = {}
    statistics = drift.DriftWatch.statistics

    def kept(watch):
        found = statistics(watch)
        watched.update({name: (found.own[name], found.drifts[name]) for name in found.own})
        return found

    monkeypatch.setattr(drift.DriftWatch, "statistics", kept)
    return watched


def test_inputs_are_paired_token_by_token(place, tmp_path, monkeypatch):
    """Sums of the last block against those of two forwards of the model, in float64."""
    _, session = opened(place, tmp_path / "codes")
    watched = watching(monkeypatch)
    polish(session)
    quantized, last = session.quantized, session.scorer.trunk.stages - 1
    group = next(g for g in quantized.groups if g.layer == last and g.role == "qkv")
    before = quantized.groups[: quantized.groups.index(group)]
    applied = Assignment.of({own.name: REFITTED for own in before})
    slot = next(s for s in quantized.dense_slots if s.linears[0] in group.linears)
    seen = []
    handle = slot.module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    width = group.linears[0].in_features
    own, moved = torch.zeros(2, width, width).double()
    for batch in session.splits["calibration"].batches:
        for row in batch:
            with torch.no_grad():
                for assignment in (Assignment.of({}), applied):
                    quantized.apply(assignment)
                    session.scorer.trunk.logits(row[None])
            x, z = (rows.flatten(0, -2).double() for rows in seen)
            seen.clear()
            own += z.mT @ z
            moved += (x - z).mT @ z
    handle.remove()
    quantized.apply(Assignment.of({}))
    found, drifts = watched[group.linears[0].input_scale_set]
    assert torch.allclose(found.sums.sum(dim=0)[0].double(), own, rtol=1e-3, atol=1e-3)
    assert torch.allclose(drifts.sums.sum(dim=0)[0].double(), moved, rtol=1e-3, atol=1e-3)
    assert moved.abs().max() > 1


def test_sequences_that_go_together_show_what_they_show_alone(place, tmp_path, monkeypatch):
    """On a GPU several share a forward; one of four is held out, whoever goes beside it."""
    shown = []
    for joined in (False, True):
        _, session = opened(place, tmp_path / str(joined))
        if joined:
            own = torch.cat(list(session.splits["calibration"].batches))
            chunks = [Chunk(own[:5], 0), Chunk(own[5:], 5)]
            monkeypatch.setattr(visitor, "chunks_of", lambda *_, own=chunks: own)
        shown.append(watching(monkeypatch))
        polish(session)
        monkeypatch.undo()
    alone, together = shown
    assert alone.keys() == together.keys()
    for name, both in alone.items():
        for one, other in zip(both, together[name], strict=True):
            assert torch.equal(one.tokens.sum(dim=1), other.tokens.sum(dim=1))
            distance = (one.sums - other.sums).flatten(1).norm(dim=1)
            assert (distance <= 0.1 * one.sums.flatten(1).norm(dim=1)).all(), name


def test_a_matrix_without_rows_in_the_bf16_model_has_no_partner_of_other_sequences(place, tmp_path):
    _, session = opened(place, tmp_path / "codes")
    group = session.quantized.groups[0]
    (name,) = {own.input_scale_set for own in group.linears}
    chunks = chunks_of(session.scorer, session.splits["calibration"])
    watch = drift.DriftWatch(session.quantized, group, [name], {}, chunks[0])
    rows = torch.ones(3, group.linears[0].in_features)
    see = watch._see
    watch.sees_bf16(chunks[0])
    see(name, 0, rows, None)
    watch.sees_bf16(chunks[1])
    watch.sees_polished()
    see(name, 0, 2 * rows, None)
    assert not watch.statistics().drifts[name].sums.any()


@pytest.mark.slow
def test_down_projections_of_experts_see_what_the_others_codes_give(tmp_path, monkeypatch):
    place = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    _, session = opened(place, tmp_path / "codes")
    watched = watching(monkeypatch)
    polish(session)
    quantized = session.quantized
    group = [g for g in quantized.groups if g.role == "experts"][-1]
    upto = quantized.groups[: quantized.groups.index(group) + 1]
    (down,) = {own.input_scale_set for own in group.linears if "down" in own.name}
    quantized.apply(Assignment.of({own.name: REFITTED for own in upto}))
    total = 0

    def see(name, _, rows, __):
        nonlocal total
        if name == down:
            total = total + rows.double().mT @ rows.double()

    taps = InputTaps(quantized, [group], see)
    with taps.installed(), torch.no_grad():
        for batch in session.splits["calibration"].batches:
            for row in batch:
                session.scorer.trunk.logits(row[None])
    quantized.apply(Assignment.of({}))
    found = watched[down][0].layer_sums.sum(dim=0).double()
    assert torch.allclose(found, total, rtol=1e-3, atol=1e-3)


def test_rows_of_an_expert_find_the_same_token_or_none():
    rows, others = torch.arange(8.0).view(4, 2), torch.arange(10.0, 16.0).view(3, 2)
    own, other = torch.tensor([1, 3, 5, 9]), torch.tensor([0, 3, 9])
    roots = torch.tensor([[2.0], [3.0], [4.0]])
    moved, found = drift._paired(rows, own, drift._Partners(others, roots, other))
    assert torch.equal(rows + moved, torch.stack([rows[0], others[1], rows[2], others[2]]))
    assert found.flatten().tolist() == [1, 3, 1, 4]
    for nothing in (None, drift._Partners(others[:0], roots[:0], other[:0])):
        moved, found = drift._paired(rows, own, nothing)
        assert not moved.any()
        assert found.eq(1).all()
    all_roots = torch.full((4, 1), 5.0)
    moved, found = drift._paired(rows, None, drift._Partners(rows + 1, all_roots, None))
    assert moved.eq(1).all()
    assert torch.equal(found, all_roots)
    moved, found = drift._paired(rows, None, drift._Partners(others, roots, None))
    assert not moved.any()
    assert found.eq(1).all()


def test_partners_of_a_sequence_are_gone_in_the_next(place, tmp_path):
    """An expert that is a module of its own is not called where no token is sent to it."""
    _, session = opened(place, tmp_path / "codes")
    group = session.quantized.groups[0]
    name = group.input_sets[0]
    (one, other) = (Chunk(torch.zeros(1, 3), sequence) for sequence in (0, 1))
    watch = drift.DriftWatch(session.quantized, group, [name], {}, one)
    rows = torch.ones(3, group.linears[0].in_features)
    watch.sees_bf16(one)
    watch._see(name, 0, 2 * rows, None)
    watch.sees_polished()
    watch._see(name, 0, rows, None)
    watch.sees_bf16(other)
    watch.sees_polished()
    watch._see(name, 0, rows, None)
    moved = watch.statistics().drifts[name]
    assert moved.sums[:, 0, 0, 0].tolist() == [3.0, 0.0]
    assert moved.tokens[:, 0].tolist() == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [Weights.RESIDENT, Weights.DISK])
def test_rows_weigh_whether_or_not_the_search_had_moments(place, tmp_path, weights):
    contents = []
    for name in ("none", "one", "all"):
        folder = tmp_path / name
        store = StatisticsStore(folder / "statistics")
        _, session = opened(place, folder / "codes", weights, store)
        groups = session.quantized.groups[: {"none": 0, "one": 1, "all": None}[name]]
        if groups:
            split = session.splits["calibration"]
            collect_moments(session.scorer, split, groups, store, lambda: None)
        polish(session)
        contents.append(content(folder / "codes"))
    assert contents[0] == contents[1] == contents[2]
    _, session = opened(place, tmp_path / "alike")
    polish(session)
    assert content(tmp_path / "alike") != contents[0]


def test_the_polished_model_is_nearer_than_one_of_the_nearest_codes(place, tmp_path):
    _, session = opened(place, tmp_path / "codes")
    polish(session)
    polished = assignment_of(session)
    nearest = Assignment.of({n: replace(c, rounding="nearest") for n, c in polished})
    scores = session.scorer.score_fully([polished, nearest], session.splits["report"])
    assert scores[0].mean < 0.8 * scores[1].mean


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["a part", "holes"])
def test_a_killed_polish_goes_on_to_the_same_codes(place, tmp_path, kept):
    _, session = opened(place, tmp_path / "whole")
    polish(session)
    whole = content(tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill():
        raise Killed

    folder = tmp_path / "killed"
    if kept == "a part":
        _, session = opened(place, folder)
        with pytest.raises(Killed):
            polish(session, kill)
        assert 0 < len(content(folder)) < len(whole)
    else:
        folder.mkdir()
        for name in sorted(whole)[::2]:
            (folder / name).write_bytes(whole[name])
        (folder / sorted(whole)[0]).write_bytes(b"damaged")
    _, session = opened(place, folder)
    polish(session)
    assert content(folder) == whole


@pytest.mark.slow
def test_where_weights_are_and_the_number_of_stages_change_no_bit(place, tmp_path):
    contents = []
    for weights in (Weights.RESIDENT, Weights.DISK):
        _, session = opened(place, tmp_path / weights, weights)
        polish(session)
        contents.append(content(tmp_path / weights))
    _, session = opened(place, tmp_path / "whole")
    session.scorer.trunk.is_whole = True
    polish(session)
    contents.append(content(tmp_path / "whole"))
    assert contents[0] == contents[1] == contents[2]


def test_codes_belong_to_the_polish_in_use(place, tmp_path):
    source, session = opened(place, tmp_path / "codes")
    polish(session)
    group = session.quantized.groups[-1]
    book = CodeBook(FileWeights(source.headers), memory_bytes=0, cache=session.quantized.book.cache)
    linear = group.linears[0]
    with pytest.raises(SourceError, match="refitted codes of"):
        book.linear(group, linear, REFITTED)
    book.use_polish("this")
    theirs = session.quantized.book.linear(group, linear, REFITTED)
    for name, part in book.linear(group, linear, REFITTED).parts.items():
        assert part.view(-1).view(torch.uint8).equal(theirs.parts[name].view(-1).view(torch.uint8))
    for own in (book, session.quantized):
        own.use_polish("another")
    with pytest.raises(SourceError, match="refitted codes of"):
        session.quantized.book.linear(group, linear, REFITTED)
    with pytest.raises(SourceError, match="refitted codes of"):
        book.linear(group, linear, REFITTED)


def test_the_cache_is_rounded_behind_quantized_blocks_alone(place, tmp_path, monkeypatch):
    _, session = opened(place, tmp_path / "codes")
    calls = []
    apply = type(session.quantized).apply

    def spy(quantized, assignment, *, with_cache=False):
        calls.append((len(list(assignment)) > 0, with_cache))
        apply(quantized, assignment, with_cache=with_cache)

    monkeypatch.setattr(type(session.quantized), "apply", spy)
    polish(session)
    assert {(True, True), (False, False)} <= set(calls)
    assert (True, False) not in calls
