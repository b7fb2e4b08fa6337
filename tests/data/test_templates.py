"""Chat templates are programs of strangers: what they may take, and what they give."""

import json
import threading

import pytest
from searchable import save_tokenizer
from transformers import AutoTokenizer

from autoquant.data.chat import Conversation
from autoquant.data.templates import TemplateProcess, apply_template
from autoquant.errors import SourceError

MESSAGES = [{"role": "user", "content": "why <|x|> \u00e4"}, {"role": "assistant", "content": "so"}]

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"

SOUND = {
    "special tokens": "{{ bos_token }}" + PLAIN + "{{ eos_token }}",
    "loop control": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}"
    "{% endfor %}{{ n.k }}",
    "json": "{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "switch": "{{ enable_thinking }}",
}

FAILING = {
    "division by zero": "{{ 1 / 0 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "no syntax": "{% for %}",
    "refusal": "{{ raise_exception('no') }}",
    "undefined": "{{ nobody.at.home }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "half a character": "{{ '\\ud800' }}",
}

EXCESSIVE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set n = namespace(s='x' * 99) %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "products": "{{ 'x' * 10 ** 11 }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", SOUND)
def test_the_text_is_that_of_transformers(tokenizer, name):
    tokenizer.chat_template = SOUND[name]
    options = {"enable_thinking": True}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert apply_template(tokenizer, MESSAGES, options) == expected


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_gives_no_text(tokenizer, name):
    tokenizer.chat_template = FAILING[name]
    assert apply_template(tokenizer, MESSAGES, {}) is None
    assert Conversation((("user", "why"), ("assistant", "so"))).render(tokenizer) == "why\nso"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow][: n != "loops"]) for n in EXCESSIVE]
)
def test_a_template_that_takes_too_much_is_an_error_in_any_thread_and_the_next_is_rendered(name):
    process = TemplateProcess(seconds=0, memory=2**29)
    found = []

    def render(template):
        arguments = {"conversations": [MESSAGES], "chat_template": template}
        try:
            found.append(process.render(arguments, "the model"))
        except SourceError as error:
            found.append(error)

    for template in (EXCESSIVE[name], PLAIN):
        thread = threading.Thread(target=render, args=(template,))
        thread.start()
        thread.join()
    error, text = found
    assert "the chat template of the model takes more than" in error.message
    assert error.fix
    assert text.startswith("[user] why")


def test_templates_see_the_same_day_on_every_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert apply_template(tokenizer, MESSAGES, {}) == "01 Jan 2026"


def test_a_tokenizer_with_code_of_its_own_is_asked_itself(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, conversation, **options):
            return json.dumps([conversation, options])

    tokenizer.__class__ = Own
    answer = json.loads(apply_template(tokenizer, MESSAGES, {"thinking": True}))
    assert answer == [MESSAGES, {"tokenize": False, "thinking": True}]
