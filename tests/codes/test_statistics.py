"""Second moments of inputs: what they sum up, and that neither batches nor kills change them."""

from types import SimpleNamespace

import pytest
import torch
from searchable import save_searchable, save_text
from torch import nn

from autoquant.codes import statistics_size
from autoquant.codes.book import CodeBook
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.weights import FileWeights
from autoquant.data.tokens import Split, TokenPlan
from autoquant.errors import SourceError
from autoquant.formats import CODES, Choice
from autoquant.measure.session import open_session
from autoquant.measure.statistics import moments, sums
from autoquant.measure.statistics.chunks import Chunk, is_held_out, why_unfitted
from autoquant.measure.statistics.moments import collect_moments
from autoquant.measure.statistics.taps import InputSetShape
from autoquant.model.binding import DenseSlot
from autoquant.model.live_weights import units_of
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.run.observer import Logged
from autoquant.source.source import open_source


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "deepseek_v3"])
def place(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_searchable(request.param, folder / "model")
    return model, save_text(folder / "text")


def opened(place, *, batch_tokens=256):
    model, text = place
    source = open_source(model)
    tokens = TokenPlan(
        calibration=384, search=64, report=64, sequence_length=32, batch_tokens=batch_tokens
    )
    session = open_session(
        source,
        [group for group in find_groups(source) if not group.closed],
        calibration=str(text),
        tokens=tokens,
        mode=ActivationMode.W4A4,
        device="cpu",
        trust_remote_code=False,
        observer=Logged(),
    )
    return source, session


def collect(session, folder, *, advance=lambda: None, alike=False):
    """Moments in a folder; `alike` lets all rows count alike."""
    store = StatisticsStore(folder)
    if alike:
        store.count_alike("asked for")
    split = session.splits["calibration"]
    collect_moments(session.scorer, split, session.quantized.groups, store, advance)
    return store


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def units(session):
    for group, slot in session.quantized.slots:
        for unit, _ in units_of(slot, group.layer):
            yield group, unit


def test_they_are_the_products_of_what_each_linear_multiplies(place, tmp_path):
    _, session = opened(place)
    store = collect(session, tmp_path / "statistics", alike=True)
    expected = _by_hooks(session)
    assert expected
    for group, unit in units(session):
        found = store.moments(unit)
        if unit.is_stack:
            _check_experts(found, session)
            continue
        sums, tokens = expected[unit.name]
        assert found.tokens.flatten().tolist() == tokens, unit.name
        assert torch.allclose(found.sums[:, 0].double(), sums, rtol=1e-4, atol=1e-4), group.name


def _by_hooks(session):
    """Sums in float64 by the linear's name, from forwards of the model as it is."""
    found = {}
    slots = {slot.module: slot.name for slot in session.quantized.dense_slots}
    part = 0

    def hook(module, arguments):
        (x,) = arguments
        rows = x.flatten(0, -2).double()
        sums, tokens = found.setdefault(
            slots[module],
            (torch.zeros(2, *2 * rows.shape[-1:], dtype=torch.float64), [0, 0]),
        )
        sums[part] += rows.mT @ rows
        tokens[part] += len(rows)

    handles = [module.register_forward_pre_hook(hook) for module in slots]
    numbers = iter(range(10**6))
    for batch in session.splits["calibration"].batches:
        for row in batch:
            part = int(is_held_out(next(numbers)))
            with torch.no_grad():
                session.scorer.trunk.logits(row[None])
    for handle in handles:
        handle.remove()
    return found


def _check_experts(found, session):
    """Every token goes to two experts, and the layer's sums are those of its experts."""
    split = session.splits["calibration"]
    assert found.tokens.sum().item() == 2 * split.tokens
    assert (found.tokens > 0).any(dim=0).sum() > 1
    assert torch.allclose(found.layer_sums, found.sums.sum(dim=1), rtol=1e-5, atol=1e-5)
    assert found.layer_tokens.tolist() == found.tokens.sum(dim=1).tolist()
    seen = found.sums[:, found.tokens.sum(dim=0) > 0]
    assert (seen.sum(dim=0).diagonal(dim1=1, dim2=2).sum(dim=1) > 0).all()
    assert torch.equal(seen, seen.mT)


def test_wide_inputs_of_all_experts_add_up_to_those_of_their_layer(tmp_path):
    place = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    _, session = opened(place)
    store = collect(session, tmp_path / "statistics", alike=True)
    hidden = []
    block = session.scorer.trunk.blocks[0].mlp.experts
    handle = block.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    for batch in session.splits["calibration"].batches:
        with torch.no_grad():
            session.scorer.trunk.logits(batch)
    handle.remove()
    rows = torch.cat(hidden).double()
    wide = next(
        unit for group, unit in units(session) if group.layer == 0 and unit.name.endswith("wide")
    )
    layer = store.moments(wide).layer_sums.sum(dim=0).double()
    assert torch.allclose(layer, 2 * rows.mT @ rows, rtol=1e-3, atol=1e-3)


def test_batches_change_no_bit(place, tmp_path):
    contents = []
    for batch_tokens in (32, 128, 384):
        _, session = opened(place, batch_tokens=batch_tokens)
        collect(session, tmp_path / str(batch_tokens))
        contents.append(content(tmp_path / str(batch_tokens)))
    assert contents[0] == contents[1] == contents[2]


def test_a_model_in_one_stage_gives_the_same(place, tmp_path):
    _, session = opened(place)
    assert not session.scorer.trunk.is_whole
    collect(session, tmp_path / "in step")
    session.scorer.trunk.is_whole = True
    collect(session, tmp_path / "whole")
    assert content(tmp_path / "in step") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["remove", "cut", "flip"])
def test_after_a_kill_only_what_is_missing_is_collected(place, tmp_path, damage, monkeypatch):
    _, session = opened(place)
    folder = tmp_path / "statistics"
    collect(session, folder)
    whole = content(folder)
    file = folder / "1.safetensors"
    if damage == "remove":
        file.unlink()
    else:
        changed = bytearray(whole[file.name])
        changed[-1] ^= 1
        file.write_bytes(changed if damage == "flip" else changed[:-9])
    written = []
    write = StatisticsStore.write
    monkeypatch.setattr(
        StatisticsStore,
        "write",
        lambda store, layer, found: (written.append(layer), write(store, layer, found)),
    )
    collect(session, folder)
    assert written == [1]
    assert content(folder) == whole
    monkeypatch.setattr(moments, "InputTaps", None)
    collect(session, folder)


def test_one_block_is_watched_at_a_time(place, tmp_path, monkeypatch):
    _, session = opened(place)
    alive, most = [], []
    zeros = sums.Sums.zeros.__func__

    def counted(cls, shape):
        own = zeros(cls, shape)
        alive.append(own)
        return own

    monkeypatch.setattr(sums.Sums, "zeros", classmethod(counted))

    def advance():
        most.append(len(alive))
        alive.clear()

    collect(session, tmp_path / "statistics", advance=advance, alike=True)
    sets = [
        {
            own.input_scale_set
            for group in session.quantized.groups
            for own in group.linears
            if group.layer == layer
        }
        for layer in range(session.scorer.trunk.stages)
    ]
    assert most == list(map(len, sets))
    assert all(most)


def test_experts_from_files_have_their_own(tmp_path):
    place = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    source, session = opened(place)
    store = collect(session, tmp_path / "statistics")
    files = FileWeights(source.headers)
    for group, stack in units(session):
        if not stack.is_stack:
            continue
        of_stack = store.moments(stack)
        names = {own.name: n for n, matrix in enumerate(stack.matrices) for own in matrix}
        for unit in files.units(group):
            if unit.name in names:
                own = store.moments(unit)
                index = names[unit.name]
                assert torch.equal(own.sums[:, 0], of_stack.sums[:, index])
                assert torch.equal(own.mean()[0], of_stack.mean()[index])


def test_experts_that_are_modules_are_told_apart(tmp_path):
    """Code that comes with a model may hold its experts as linears."""
    place = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    _, session = opened(place)
    stacked = collect(session, tmp_path / "stacked")
    stack = next(unit for _, unit in units(session) if unit.name.endswith("wide"))
    expected = stacked.moments(stack)
    group = next(g for g in session.quantized.groups if g.role == "experts" and g.layer == 0)
    linears = [own for own in group.linears if own.name.endswith(("gate_proj", "up_proj"))]
    watch = moments._Watch(session.quantized, (), lambda _: None, Chunk(torch.zeros(1, 7), 0))
    taps = watch.taps
    modules = {own.name: nn.Linear(own.in_features, own.out_features) for own in linears}
    taps._watch_dense([DenseSlot(linears=(own,), module=modules[own.name]) for own in linears])
    assert len(taps._dense) == len(stack.matrices)
    ((name, shape),) = taps.sets.items()
    watch._sums[name], watch._weights[name] = sums.Sums.zeros(shape), None
    assert watch._sums[name].sums.shape == expected.sums.shape
    rows = torch.randn(5, linears[0].in_features)
    first, last = (next(m for m, own in taps._dense.items() if own[1] == n) for n in (0, 3))
    taps.see(last, rows)
    watch.chunk = Chunk(torch.zeros(1, 7), 1)
    taps.see(first, rows[:2])
    found = watch.moments()[name]
    assert found.tokens.tolist() == [[0, 0, 0, 5], [2, 0, 0, 0]]
    assert torch.allclose(found.sums[0, 3], rows.mT @ rows)


def test_experts_whose_sums_take_too_much_have_those_of_their_layer(tmp_path, monkeypatch):
    place = save_searchable("qwen3_moe", tmp_path / "model"), save_text(tmp_path / "text")
    source, session = opened(place)
    each = collect(session, tmp_path / "each")
    monkeypatch.setattr(statistics_size, "MOST_BYTES_OF_A_SET", 0)
    shared = collect(session, tmp_path / "shared")
    assert sum(map(len, content(tmp_path / "shared").values())) < sum(
        map(len, content(tmp_path / "each").values())
    )
    files = FileWeights(source.headers)
    for group, unit in units(session):
        own, of_layer = each.moments(unit), shared.moments(unit)
        if not unit.is_stack:
            assert torch.equal(own.sums, of_layer.sums)
            continue
        experts = len(unit.matrices)
        assert torch.equal(own.tokens, of_layer.tokens)
        assert torch.allclose(own.layer_sums, of_layer.layer_sums, rtol=1e-4, atol=1e-4)
        found = of_layer.mean()
        assert found.shape[0] == experts
        expected = own.layer_sums.sum(dim=0) / own.layer_tokens.sum()
        assert torch.allclose(found, expected.expand_as(found), rtol=1e-4, atol=1e-5)
        assert of_layer.why_plain() == own.why_plain()
        names = {linear.name: n for n, matrix in enumerate(unit.matrices) for linear in matrix}
        alone = next(u for u in files.units(group) if names.get(u.name) == experts - 1)
        last = shared.moments(alone)
        assert torch.equal(last.mean()[0], found[-1])
        assert last.tokens.tolist() == of_layer.tokens[:, -1:].tolist()


def test_experts_have_sums_of_their_own_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(statistics_size, "MOST_BYTES_OF_A_SET", 2 * 4 * 3 * 16 * 16)

    def kept(experts, inputs):
        shape = InputSetShape(experts, inputs, torch.device("cpu"))
        return sums.Sums.zeros(shape).sums.shape[1]

    assert (kept(3, 16), kept(4, 16), kept(3, 17)) == (3, 1, 1)


def test_an_expert_whose_sums_are_not_finite_adds_nothing_to_its_layer():
    of_set = sums.Sums.zeros(InputSetShape(2, 16, torch.device("cpu")))
    for rows, value, part, expert in ((3, 2.0, 0, 0), (5, float("inf"), 0, 1), (7, 1.0, 1, 1)):
        x = torch.full((rows, 16), value)
        of_set.add(x, x, part, expert)
    found = of_set.moments()
    assert torch.equal(found.layer_sums[0], torch.full((16, 16), 12.0))
    assert torch.equal(found.layer_sums[1], torch.full((16, 16), 7.0))
    assert found.layer_tokens.tolist() == [3, 7]
    assert found.tokens.tolist() == [[3, 5], [0, 7]]


@pytest.mark.parametrize("most", [None, 0])
def test_what_they_take_is_known_before_they_are_collected(place, tmp_path, monkeypatch, most):
    if most is not None:
        monkeypatch.setattr(statistics_size, "MOST_BYTES_OF_A_SET", most)
    _, session = opened(place)
    collect(session, tmp_path / "statistics", alike=True)
    taken = sum(map(len, content(tmp_path / "statistics").values()))
    expected = statistics_size.statistics_bytes(session.quantized.groups)
    assert expected <= taken < 1.05 * expected + 30_000


def test_a_disk_without_room_for_them_is_named(place, tmp_path, monkeypatch):
    _, session = opened(place)
    groups, folder = session.quantized.groups, tmp_path / "run" / "statistics"
    needed = statistics_size.statistics_bytes(groups)

    def left(free):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(statistics_size.shutil, "disk_usage", lambda _: usage)

    left(needed)
    statistics_size.require_disk(folder, groups)
    left(needed - 1)
    with pytest.raises(SourceError, match="its disk has") as refused:
        statistics_size.require_disk(folder, groups)
    assert "--effort fast" in refused.value.fix
    folder.mkdir(parents=True)
    (folder / "0.safetensors").write_bytes(bytes(100))
    left(needed - 100)
    statistics_size.require_disk(folder, groups)


def test_text_that_codes_cannot_be_fitted_to_is_named():
    def why(*batches):
        return why_unfitted(Split.unrelated("calibration", [torch.zeros(b) for b in batches], ""))

    assert "one sequence" in why((1, 512))
    assert why((1, 32), (1, 31)) == "calibration has 63 tokens, fewer than 64"
    assert why((1, 32), (1, 32)) is why((2, 32)) is None


def test_every_fourth_sequence_is_held_out():
    assert [n for n in range(12) if is_held_out(n)] == [1, 5, 9]


def test_nothing_is_watched_afterwards(place, tmp_path):
    _, session = opened(place)
    modules = list(session.scorer.quantized.model.modules())
    before = [(m.__dict__.get("forward"), getattr(m, "autoquant_hook", None)) for m in modules]
    collect(session, tmp_path / "statistics")
    after = [(m.__dict__.get("forward"), getattr(m, "autoquant_hook", None)) for m in modules]
    assert after == before


def test_the_choices_of_a_group_share_what_is_worked_out_of_its_moments(place, tmp_path):
    _, session = opened(place)
    store = collect(session, tmp_path / "statistics")
    book = CodeBook(session.quantized.weights, memory_bytes=0, statistics=store)
    first, second, *_ = (g for g in session.quantized.groups if g.role in ("o", "down"))
    choices = [Choice.parse(text) for text in ("nvfp4/mse/gptq", "nvfp4/hessian/gptq")]
    shared = [book.linear(first, first.linears[0], choice) for choice in choices]
    worked_out = [moved for _, moved in book._encoder._used.values()]
    assert all(own.kept for own in worked_out)
    book.linear(second, second.linears[0], choices[0])
    assert not any(own.kept for own in worked_out)
    for choice, codes in zip(choices, shared, strict=True):
        alone = CodeBook(session.quantized.weights, memory_bytes=0, statistics=store)
        expected = alone.linear(first, first.linears[0], choice)
        assert torch.equal(codes.parts[CODES], expected.parts[CODES])
