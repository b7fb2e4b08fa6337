"""What the harness is told of a model is what the scorer measures of it."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from searchable import save_searchable

from autoquant.data.tokens import Split
from autoquant.evaluate.language_model import ScoredModel
from autoquant.formats import FP8, NVFP4
from autoquant.forward.flow import BF16_MODEL
from autoquant.measure.calibration import calibrate
from autoquant.measure.scorer import Scorer
from autoquant.measure.session import Session
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import load_model
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.grouping import find_groups
from autoquant.progress import Silent
from autoquant.source.source import open_source

CPU = torch.device("cpu")
PAIRS = (
    ("the block rounds", " a scale"),
    ("", "weight"),
    ("token ", "head of a layer"),
    ("a", "b"),
    ("the expert of", " the router"),
)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request, tmp_path_factory):
    return save_searchable(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def session(folder):
    loaded = load_model(folder, CPU)
    quantized = QuantizedModel(
        loaded.model, find_groups(open_source(folder)), mode=ActivationMode.W4A4
    )
    scorer = Scorer(quantized, CPU)
    tokens = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    split = Split.unrelated("calibration", (tokens,), digest="c")
    scorer.check(split)
    quantized.set_input_scales(calibrate(scorer, split, lambda: None).scales())
    return Session(loaded=loaded, scorer=scorer, splits={"calibration": split})


def model_of(session, assignment=BF16_MODEL, *, batch_tokens=64):
    return ScoredModel(
        session,
        assignment,
        with_cache=True,
        batch_tokens=batch_tokens,
        observer=Silent(),
        name="tested",
    )


def uniform(session, choice):
    return Assignment.of({group.name: choice for group in session.quantized.groups})


def asked(kind, *arguments):
    return [Instance(kind, {}, own, 0) for own in arguments]


def test_likelihoods_are_those_of_the_harness_own_model(session, folder):
    from lm_eval.models.huggingface import HFLM

    oracle = HFLM(
        pretrained=load_model(folder, CPU).model,
        tokenizer=session.loaded.tokenizer,
        device="cpu",
        batch_size=1,
    )
    requests = asked("loglikelihood", *PAIRS)
    ours = model_of(session).loglikelihood(requests, disable_tqdm=True)
    theirs = oracle.loglikelihood(requests, disable_tqdm=True)
    for (own, own_greedy), (other, other_greedy), pair in zip(ours, theirs, PAIRS, strict=True):
        if pair[0]:  # the harness begins an empty context with another token
            assert own == pytest.approx(other, abs=0.15)
            assert own_greedy == other_greedy


@pytest.mark.parametrize("choice", [NVFP4, FP8])
def test_likelihoods_under_an_assignment_are_those_of_its_logits(session, choice):
    assignment = uniform(session, choice)
    model = model_of(session, assignment)
    (found,) = model.loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    tokens = model.tok_encode(PAIRS[0][0] + PAIRS[0][1])
    count = len(tokens) - len(model.tok_encode(PAIRS[0][0]))
    scorer = session.scorer
    (hidden,) = scorer.forward([torch.tensor([tokens[:-1]])], assignment)
    session.quantized.apply(assignment)
    logits = scorer.head.candidate_logits(hidden[0], scorer.head.buffers(hidden, 1)[0])
    session.quantized.apply(BF16_MODEL)
    expected = torch.log_softmax(logits.double(), -1)
    expected = expected[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    assert found[0] == pytest.approx(float(expected[-count:].sum()), abs=1e-4)
    (bf16,) = model_of(session).loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert abs(found[0] - bf16[0]) > 1e-3


def test_neither_the_order_nor_the_batch_changes_an_answer(session):
    def answers(pairs, batch_tokens):
        model = model_of(session, uniform(session, NVFP4), batch_tokens=batch_tokens)
        found = model.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
        return [likelihood for likelihood, _ in found]

    together = answers(PAIRS * 3, 256)
    assert together[:5] == together[5:10] == together[10:]
    assert answers(PAIRS, 1) == pytest.approx(together[:5], abs=0.1)
    assert answers(PAIRS[::-1], 256) == pytest.approx(together[4::-1], abs=0.1)


def test_a_text_longer_than_the_model_is_read_in_windows(session):
    model = model_of(session)
    text = "scale block weight " * 4
    (whole,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    model.max_length = 16
    (parts,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert whole < 0
    assert parts != whole
    tokens = model.tok_encode(text)
    assert parts == pytest.approx(whole, rel=0.2)
    assert len(tokens) > 2 * model.max_length


def test_a_long_context_loses_its_beginning(session):
    model = model_of(session)
    model.max_length = 12
    long, short = ("x" * 40 + "the block", " a"), ("x" * 2 + "the block", " a")
    found = model.loglikelihood(asked("loglikelihood", long, short), disable_tqdm=True)
    assert found[0] == pytest.approx(found[1], abs=0.05)


@pytest.mark.parametrize("quantized", [False, True])
def test_generation_writes_what_is_likeliest_under_the_assignment(session, quantized, monkeypatch):
    assignment = uniform(session, NVFP4) if quantized else BF16_MODEL
    model, prompts = model_of(session, assignment), ("the block rounds", "a")
    generate, written = model._generate, []
    monkeypatch.setattr(model, "_generate", lambda *own: written.extend(generate(*own)) or written)
    options = {"until": [], "max_gen_toks": 4}
    model.generate_until(asked("generate_until", *((own, options) for own in prompts)))
    for prompt, row in zip(prompts, written, strict=True):
        tokens = model.tok_encode(prompt)
        assert len(row) == 4
        for token in row:
            ((_, is_likeliest),) = model._loglikelihood_tokens([(("", ""), tokens, [token])])
            assert is_likeliest
            tokens = [*tokens, token]


def test_generation_ends_at_the_stops_of_the_task(session):
    model = model_of(session)
    (whole,) = model.generate_until(
        asked("generate_until", ("the block", {"until": [], "max_gen_toks": 8}))
    )
    assert len(whole) > 2
    stop = whole[1]
    (short,) = model.generate_until(
        asked("generate_until", ("the block", {"until": [stop], "max_gen_toks": 8}))
    )
    assert short == whole.split(stop)[0]


def test_the_model_is_in_bf16_again_afterwards(session):
    tokens = torch.tensor([[5, 9, 40, 7]])
    before = session.scorer.trunk.logits(tokens)
    model = model_of(session, uniform(session, NVFP4))
    model.loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    model.generate_until(asked("generate_until", ("a", {"until": [], "max_gen_toks": 2})))
    with torch.no_grad():
        assert torch.equal(session.scorer.trunk.logits(tokens), before)


def test_a_chat_template_is_the_model_s_own(session, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(session.loaded.tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "a question"}]
    assert model_of(session).apply_chat_template(turns) == "<user>a question<assistant>"


def test_without_a_chat_template_the_way_out_is_named(session):
    from autoquant.errors import SourceError

    with pytest.raises(SourceError, match="is missing") as caught:
        model_of(session).apply_chat_template([{"role": "user", "content": "a"}])
    assert "--chat-template" in caught.value.fix


def test_a_prompt_that_begins_with_its_first_token_gets_no_second(session):
    tokenizer = SimpleNamespace(
        bos_token="<s>", encode=lambda text, add_special_tokens: [add_special_tokens]
    )
    model = model_of(session)
    model.tokenizer = tokenizer
    assert model.tok_encode("<s>hello") == [False]
    assert model.tok_encode("hello") == [True]
