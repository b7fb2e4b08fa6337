"""Instruction data: what a served model would read of it."""

import json
import random

import pytest
from searchable import WORDS, save_tokenizer
from transformers import AutoTokenizer

from autoquant.data.chat import SYSTEM_PROMPTS, Conversation
from autoquant.data.text import Corpus, load_corpus
from autoquant.data.tokens import TokenPlan, make_splits

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
CONVERSATION = Conversation((("user", "why"), ("assistant", "because")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, bos=True)
    return folder


def tokenizer_with(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def conversations(count):
    generator = random.Random(0)
    for _ in range(count):
        question, answer = (" ".join(generator.choice(WORDS) for _ in range(40)) for _ in range(2))
        yield Conversation((("user", question), ("assistant", answer)))


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (
            {
                "text": "[INST] of another model",
                "messages": [
                    {"role": "system", "content": "short"},
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "assistant", "content": None, "tool_calls": []},
                ],
            },
            (("system", "short"), ("user", "hi")),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            (("user", "a"), ("assistant", "b")),
        ),
        ({"prompt": "a", "completion": "b"}, (("user", "a"), ("assistant", "b"))),
        (
            {"instruction": "Translate.", "input": "un", "output": "one"},
            (("user", "Translate.\n\nun"), ("assistant", "one")),
        ),
        (
            {"instruction": "Greet.", "input": "", "output": "hi"},
            (("user", "Greet."), ("assistant", "hi")),
        ),
    ],
)
def test_columns_of_published_data_sets_are_conversations(record, turns):
    assert Conversation.of(record) == Conversation(turns)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a", "prompt": "b", "answer": "c"},
        {"prompt": "b"},
        {"prompt": "b", "answer": " "},
        {"messages": []},
        {"messages": ["a"]},
        {"messages": [{"role": "user", "content": ""}]},
    ],
)
def test_other_records_are_none(record):
    assert Conversation.of(record) is None


def test_half_of_the_conversations_are_given_a_system_prompt(folder):
    tokenizer = tokenizer_with(folder, TEMPLATE)
    given = {}
    for conversation in conversations(400):
        rendered = conversation.render(tokenizer)
        plain = "".join(f"[{role}] {text}\n" for role, text in conversation.turns)
        assert rendered.endswith(plain)
        before = rendered.removesuffix(plain).removeprefix("<s>")
        prompt = before.removeprefix("[system] ").removesuffix("\n")
        assert prompt in (*SYSTEM_PROMPTS, "")
        given[prompt] = given.get(prompt, 0) + 1
        assert conversation.render(tokenizer) == rendered
    assert given.keys() == {*SYSTEM_PROMPTS, ""}
    assert 160 < given[""] < 240


def test_a_system_prompt_of_its_own_stays(folder):
    for conversation in conversations(20):
        own = Conversation((("system", "Mine."), *conversation.turns))
        rendered = own.render(tokenizer_with(folder, TEMPLATE))
        assert rendered.startswith("<s>[system] Mine.\n[user]")
        assert rendered.count("[system]") == 1


def test_a_template_that_knows_no_system_prompt_does_without(folder):
    tokenizer = tokenizer_with(folder, NO_SYSTEM + TEMPLATE)
    for conversation in conversations(20):
        assert conversation.render(tokenizer).startswith("<s>[user]")


@pytest.mark.parametrize("template", [None, "{{ raise_exception('never') }}"])
def test_without_a_template_that_takes_it_a_conversation_is_plain_text(folder, template):
    assert CONVERSATION.render(tokenizer_with(folder, template)) == "why\nbecause"


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_on_for_half_of_the_conversations(folder, switch):
    tokenizer = tokenizer_with(folder, f"{{{{ {switch} }}}}|" + TEMPLATE)
    found = [conversation.render(tokenizer).split("|")[0] for conversation in conversations(200)]
    assert set(found) == {"True", "False"}
    assert 70 < found.count("True") < 130


def test_one_of_several_templates_is_drawn_and_one_that_fails_is_not_used(folder):
    named = {"default": TEMPLATE, "tool_use": f"<tools>{TEMPLATE}"}
    tokenizer = tokenizer_with(folder, named)
    for conversation in conversations(20):
        assert conversation.render(tokenizer) == conversation.render(tokenizer)
    starts = [c.render(tokenizer).startswith("<tools>") for c in conversations(200)]
    assert 70 < sum(starts) < 130
    named["tool_use"] = "{{ raise_exception('no tools') }}"
    assert all(c.render(tokenizer).startswith("<s>[") for c in conversations(50))


def test_splits_hold_rendered_conversations_and_sides_do_not_depend_on_the_seed(folder, tmp_path):
    file = tmp_path / "chat.jsonl"
    records = [
        {"messages": [{"role": role, "content": text} for role, text in conversation.turns]}
        for conversation in conversations(60)
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    tokenizer = tokenizer_with(folder, TEMPLATE)
    corpus = load_corpus(str(file))
    found = []
    for seed in (0, 1):
        plan = TokenPlan(
            calibration=10**6, search=10**6, report=10**6, sequence_length=1024, seed=seed
        )
        splits = make_splits(corpus, tokenizer, plan)
        found.append(
            {
                name: {tuple(row.tolist()) for batch in split.batches for row in batch}
                for name, split in splits.items()
            }
        )
    assert found[0] == found[1]
    sequences = [row for rows in found[0].values() for row in rows]
    assert len(sequences) == len(records)
    for row in sequences:
        letters = tokenizer.decode(row).replace(" ", "")
        assert letters.count("<s>") == 1
        assert letters.startswith(("<s>[system]", "<s>[user]"))


def test_plain_text_is_as_it_was(folder):
    corpus = Corpus(name="plain", documents=tuple(f"[user] {n} " * 20 for n in range(60)))
    plan = TokenPlan(calibration=10**6, search=10**6, report=10**6, sequence_length=64)
    with_template, without = (
        make_splits(corpus, tokenizer_with(folder, template), plan) for template in (TEMPLATE, None)
    )
    digests = [{n: s.digest for n, s in splits.items()} for splits in (with_template, without)]
    assert digests[0] == digests[1]


PARTS = (
    "{% for m in messages %}[{{ m['role'] }}] {% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}{% endfor %}{{ '\\n' }}"
    "{% endfor %}"
)


def test_a_template_that_walks_typed_parts_keeps_every_turn(folder):
    rendered = CONVERSATION.render(tokenizer_with(folder, PARTS))
    assert rendered.endswith("[user] why\n[assistant] because\n")


def test_a_template_that_repeats_a_text_of_parts_is_given_the_text(folder):
    """Printed as it is, a list of parts holds the text too, and the text is what is meant."""
    rendered = CONVERSATION.render(tokenizer_with(folder, TEMPLATE))
    assert rendered.endswith("[user] why\n[assistant] because\n")


def test_a_template_that_drops_a_turn_either_way_is_given_texts(folder):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    rendered = CONVERSATION.render(tokenizer_with(folder, template + "{% endfor %}"))
    assert rendered == "why"


def test_a_template_that_refuses_texts_is_given_parts(folder):
    refusing = "{% if messages[0]['content'] is string %}{{ raise_exception('no') }}{% endif %}"
    rendered = CONVERSATION.render(tokenizer_with(folder, refusing + PARTS))
    assert rendered.endswith("[user] why\n[assistant] because\n")
