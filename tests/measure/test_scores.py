"""KL: the right number, the same number however much of the forward is reused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from searchable import save_searchable
from tiny_models import save_model

from autoquant.data.tokens import Split
from autoquant.errors import SourceError
from autoquant.formats import BF16, FP8, NVFP4
from autoquant.forward.flow import Flow, walk
from autoquant.measure.calibration import calibrate
from autoquant.measure.kl import TokenKl, TokenScores
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.source.source import open_source

CPU = torch.device("cpu")


def split_of(name="search", *, batches=2, rows=4, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 200, (batches, rows, length), generator=generator)
    return Split.unrelated(name, tuple(tokens), digest=f"{name}-{seed}")


SPLIT = split_of()


def scorer_of(folder, **settings):
    groups = find_groups(open_source(folder))
    model = load_model(folder, CPU).model
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4)
    scorer = Scorer(quantized, CPU, **settings)
    calibration = calibrate(scorer, SPLIT, lambda: None)
    quantized.set_input_scales(calibration.scales())
    return scorer


@pytest.fixture(scope="module", params=["llama", "minimax_m2"])
def folder(request, tmp_path_factory):
    return save_searchable(
        request.param, tmp_path_factory.mktemp(request.param) / "source", num_hidden_layers=3
    )


@pytest.fixture(scope="module")
def scorer(folder):
    scorer = scorer_of(folder)
    scorer.check(SPLIT)
    return scorer


@pytest.fixture(scope="module")
def candidates(scorer):
    """Assignments that differ in the first block, the last block, the head, and everywhere."""
    names = [group.name for group in scorer.quantized.groups]
    return (
        Assignment.of(dict.fromkeys(names, NVFP4)),
        Assignment.of(dict.fromkeys(names, FP8)),
        Assignment.of({names[0]: NVFP4}),
        Assignment.of({names[-2]: NVFP4}),
        Assignment.of({"lm_head": NVFP4}),
        Assignment.of({}),
    )


@torch.inference_mode()
def logits_of(scorer, assignment, tokens):
    """Float64 logits of a whole forward, the head's product included."""
    (hidden,) = scorer.forward([tokens], assignment)
    scorer.quantized.apply(assignment)
    hidden, weight = scorer.quantized.operands(scorer.trunk.head, hidden)
    logits = hidden.double() @ weight.double().t()
    scorer.quantized.choose({})
    scorer.quantized.forget_inputs()
    return logits


def exact_kl(scorer, assignment):
    kl = []
    for tokens in SPLIT.batches:
        log_p = logits_of(scorer, Assignment.of({}), tokens).log_softmax(dim=-1)
        log_q = logits_of(scorer, assignment, tokens).log_softmax(dim=-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).flatten())
    return torch.cat(kl).numpy()


def test_kl_is_that_of_full_logits_in_float64(scorer, candidates):
    for candidate in candidates[:-1]:
        expected = exact_kl(scorer, candidate)
        assert expected.mean() > 1e-4
        np.testing.assert_allclose(
            scorer.score(candidate, SPLIT).kl, expected, atol=2e-6, rtol=1e-4
        )


def test_the_model_itself_has_no_kl(scorer):
    (scores,) = scorer.score_fully([Assignment.of({})], SPLIT)
    assert scores.kl.max() == 0.0
    assert scores.top1_agreement() == 1.0
    perplexity = scores.perplexity()
    assert perplexity["bf16"] == perplexity["quantized"]


def test_kl_does_not_depend_on_what_was_measured_before(folder, scorer, candidates):
    fresh = scorer_of(folder, cache_bytes=0)
    for candidate in (*candidates, *reversed(candidates)):
        reused = scorer.score(candidate, SPLIT)
        assert np.array_equal(reused.kl, fresh.score(candidate, SPLIT).kl)
        (fully,) = scorer.score_fully([candidate], SPLIT)
        assert np.array_equal(reused.kl, fully.kl)


def test_the_last_word_keeps_no_logits(scorer, candidates):
    """They would lie between freed buffers, and memory would grow batch by batch."""
    fresh = split_of("report", seed=7)
    before = scorer._cache.left
    scorer.score_fully(candidates[:2], fresh)
    assert scorer._cache.left == before
    assert not any(scorer._batch(fresh, index).logits for index in range(len(fresh.batches)))
    scorer.forget(fresh)


def test_a_probe_is_the_score_of_its_group_alone(scorer):
    keys = [(group.name, choice) for group in scorer.quantized.groups for choice in (NVFP4, FP8)]
    wanted = [(index, key) for index in range(len(SPLIT.batches)) for key in keys]
    for (index, key), probed in zip(wanted, scorer.probe(SPLIT, wanted), strict=True):
        assert (probed.batch, probed.key) == (index, key)
        ((alone,),) = scorer.score_batches([[Assignment.of(dict([key]))]], SPLIT, [index])
        assert np.array_equal(probed.kl.kl, alone.kl)


def test_forwards_start_between_blocks(scorer, monkeypatch):
    assert not scorer.trunk.is_whole
    ran = []
    for index, block in enumerate(scorer.trunk.blocks):
        norm, forward = block.input_layernorm, block.input_layernorm.forward

        def seen(x, index=index, forward=forward):
            ran.append(index)
            return forward(x)

        monkeypatch.setattr(norm, "forward", seen)
    (whole,) = scorer.bf16_states(SPLIT, [0])
    assert ran == [0, 1, 2]
    ran.clear()
    later = Flow(parts=whole.parts, start=2, after=whole)
    walk(scorer.trunk, scorer.quantized, scorer.room, [later])
    assert ran == [2]
    assert torch.equal(later.hidden, whole.hidden)


@torch.inference_mode()
def test_a_batch_in_parts_with_its_states_on_the_host_scores_the_same(folder, scorer, candidates):
    limited = scorer_of(folder, cache_bytes=2**30)
    limited.check(SPLIT)
    limited.room.sequences_at_once, limited.room.device_bytes = 3, 0
    (flow,) = limited.bf16_states(SPLIT, [0])
    assert [[len(state) for state in states] for states in flow.boundaries] == [[2, 2]] * 3
    assert flow.bytes == scorer.bf16_states(SPLIT, [0])[0].bytes
    for candidate in candidates:
        expected = scorer.score(candidate, SPLIT).kl
        np.testing.assert_allclose(
            limited.score(candidate, SPLIT).kl, expected, rtol=1e-5, atol=1e-7
        )
    key = (limited.quantized.groups[-3].name, NVFP4)
    (probed,) = limited.probe(SPLIT, [(0, key)])
    ((alone,),) = limited.score_batches([[Assignment.of(dict([key]))]], SPLIT, [0])
    assert np.array_equal(probed.kl.kl, alone.kl)
    assert limited.noise(SPLIT).mean < 1e-2  # a router may turn at one token


def test_blocks_that_share_more_than_a_state_are_run_whole(folder):
    scorer = scorer_of(folder)
    first, last = scorer.trunk.blocks[0], scorer.trunk.blocks[-1]
    memory = {}

    def after_first(block, args, output):
        memory["first"] = output[0] if isinstance(output, tuple) else output
        return output

    def after_last(block, args, output):
        state = output[0] if isinstance(output, tuple) else output
        mixed = state + memory.pop("first")
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    first.register_forward_hook(after_first)
    last.register_forward_hook(after_last)
    candidate = Assignment.of({scorer.quantized.groups[-2].name: NVFP4})
    scorer.check(SPLIT)
    assert scorer.trunk.is_whole
    np.testing.assert_allclose(
        scorer.score(candidate, SPLIT).kl, exact_kl(scorer, candidate), atol=2e-6, rtol=1e-4
    )


def test_noise_is_far_below_any_quantization(scorer, candidates):
    noise = scorer.noise(SPLIT).mean
    assert 0.0 <= noise < 0.1 * scorer.score(candidates[1], SPLIT).mean


def test_memory_of_a_split_is_given_back(folder, candidates):
    scorer = scorer_of(folder)
    before = scorer._cache.left
    other = split_of("report", seed=1)
    scorer.score(candidates[0], other)
    assert scorer._cache.left < before
    scorer.forget(other)
    assert scorer._cache.left == before
    assert not any(digest == other.digest for digest, _ in scorer._batches)


def test_all_tokens_but_the_last_have_a_likelihood(scorer, candidates):
    (scores,) = scorer.score_fully([candidates[0]], SPLIT)
    assert np.isnan(scores.nll).sum() == SPLIT.sequences
    expected = []
    for tokens in SPLIT.batches:
        log_q = logits_of(scorer, candidates[0], tokens).log_softmax(dim=-1)
        expected.append(-log_q[:, :-1].gather(2, tokens[:, 1:, None]))
    perplexity = math.exp(torch.cat(expected).mean())
    assert scores.perplexity()["quantized"] == pytest.approx(perplexity, rel=1e-5)


def test_calibration_sees_every_input_and_the_head(folder):
    groups = find_groups(open_source(folder))
    model = load_model(folder, CPU).model
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4)
    scorer = Scorer(quantized, CPU)
    scorer.check(SPLIT)  # as in every session: the first forward of a class of blocks is run twice
    calibration = calibrate(scorer, SPLIT, lambda: None)
    assert calibration.unseen == ()
    largest = max(hidden.abs().max().item() for hidden in scorer.forward(SPLIT.batches))
    assert calibration.input_amax["lm_head"] == largest
    for tokens in calibration.expert_tokens.values():
        assert sum(tokens) == 2 * SPLIT.tokens


def test_an_infinite_input_is_named(folder):
    groups = find_groups(open_source(folder))
    model = load_model(folder, CPU).model
    quantized = QuantizedModel(model, groups, mode=ActivationMode.W4A4)
    scorer = Scorer(quantized, CPU)
    scorer.trunk.blocks[1].self_attn.register_forward_hook(
        lambda module, args, output: (output[0] * float("inf"), *output[1:])
    )
    with pytest.raises(SourceError, match=r"input of model\.layers\.1\.\S*(mlp|moe)\S* holds NaN"):
        calibrate(scorer, SPLIT, lambda: None)


def test_logits_that_are_only_cast_after_the_head_are_fine(tmp_path):
    model = load_model_without_tokenizer(tmp_path)
    forward = model.forward

    def cast(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = cast
    Scorer(QuantizedModel(model, (), mode=ActivationMode.W4A4), CPU).check(SPLIT)


def load_model_without_tokenizer(folder):
    from transformers import AutoModelForCausalLM

    save_model("llama", folder / "source", vocab_size=272)
    return AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.bfloat16).eval()


def scores_of(kl, sequence, unit=None):
    """KL of tokens; each sequence is a unit of its own unless told."""
    own = np.arange(max(sequence) + 1) if unit is None else np.array(unit)
    return TokenKl(kl=np.array(kl, dtype=np.float64), sequence=np.array(sequence), unit=own)


def test_the_standard_error_takes_documents_as_units():
    """Eight sequences a document that differ in nothing are worth one."""
    means = np.random.default_rng(0).normal(1.0, 0.5, 50)
    kl, sequence = np.repeat(means, 8 * 4), np.repeat(np.arange(400), 4)
    scores = scores_of(kl, sequence, np.repeat(np.arange(50), 8))
    assert scores.mean == pytest.approx(means.mean())
    assert scores.stderr() == pytest.approx(means.std(ddof=1) / math.sqrt(50))
    apart = scores_of(kl, sequence)
    assert scores.stderr() / apart.stderr() == pytest.approx(math.sqrt(8), rel=0.01)
    assert math.isnan(scores_of([1.0, 2.0], [0, 1], [3, 3]).stderr())


def test_long_sequences_weigh_more():
    scores = scores_of([1.0, 1.0, 1.0, 4.0], [0, 0, 0, 1])
    assert scores.mean == 1.75
    assert list(scores.by_sequence()) == [1.0, 4.0]


def test_batches_join_in_order():
    joined = TokenKl.joined(
        [scores_of([1, 2], [0, 1], [7, 4]), scores_of([3, 4, 5], [0, 0, 1], [4, 9])]
    )
    assert list(joined.kl) == [1, 2, 3, 4, 5]
    assert list(joined.sequence) == [0, 1, 2, 2, 3]
    assert list(joined.unit) == [7, 4, 4, 9]


def test_scores_know_the_units_of_their_split(scorer):
    units = (np.array([3, 3, 0, 0]), np.array([1, 4, 4, 4]))
    split = replace(SPLIT, documents=units, passages=units, digest="four documents")
    assignment = Assignment.of({"lm_head": FP8})
    for scores in (scorer.score(assignment, split), *scorer.score_fully([assignment], split)):
        assert list(scores.unit) == [3, 3, 0, 0, 1, 4, 4, 4]


def test_the_summary_names_the_tail():
    summary = scores_of(np.arange(1001) / 1000, np.arange(1001)).summary()
    assert summary["median"] == pytest.approx(0.5)
    assert summary["p99"] == pytest.approx(0.99)
    assert summary["p999"] == pytest.approx(0.999)
    assert summary["max"] == 1.0


def test_scores_of_a_candidate_in_bf16_agree_everywhere(scorer):
    (scores,) = scorer.score_fully([Assignment.of({"lm_head": BF16})], SPLIT)
    assert isinstance(scores, TokenScores)
    assert scores.agrees.all()
