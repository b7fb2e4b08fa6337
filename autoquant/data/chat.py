"""Instruction data: conversations as the model's own chat template writes them."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from autoquant.data.templates import apply_template

SYSTEM_SHARE = 0.5
"""Of the conversations without a system prompt that are given one."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful expert. Think before you answer, and say when you are not sure.",
    "Answer briefly.",
    "Answer in detail, with examples.",
    "You are a patient teacher. Explain one step at a time.",
    "You are a senior software engineer. Prefer working code to long explanations.",
    "You are an assistant for a company's customers. Be polite and keep to the matter.",
    "You are a scientist. State assumptions, units and sources of error.",
    "You are a translator and editor. Keep the author's meaning and tone.",
    "Answer in Markdown, with headings and lists where they help.",
    "Answer in JSON with the keys `answer` and `confidence`.",
    "Follow the user's instructions exactly, and refuse what would do harm.",
)

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates of reasoning models are switched on and off."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_QUESTIONS = ("prompt", "question", "instruction", "query")
_ANSWERS = ("answer", "response", "completion", "output")


class ChatTokenizer(Protocol):
    """What this module needs of a tokenizer with a chat template."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, each a role (`system`, `user`, `assistant`, ...) and a text."""

    turns: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self | None:
        """The conversation that a record of a data set holds, or None.

        Known are `messages` (role, content), `conversations` (from, value), and a pair of columns
        such as `prompt` and `answer` or `instruction`, `input` and `output`.
        """
        for column, role, content in (
            ("messages", "role", "content"),
            ("conversations", "from", "value"),
        ):
            if isinstance(record.get(column), list):
                turns = [_turn(turn, role, content) for turn in record[column]]
                found = tuple(turn for turn in turns if turn is not None and turn[1])
                return cls(found) if found and None not in turns else None
        question = next((record[n] for n in _QUESTIONS if _is_text(record.get(n))), None)
        answer = next((record[n] for n in _ANSWERS if _is_text(record.get(n))), None)
        if question is None or answer is None or _is_text(record.get("text")):
            return None
        details = record.get("input")
        asked = f"{question}\n\n{details}" if _is_text(details) else question
        return cls((("user", asked), ("assistant", answer)))

    @property
    def text(self) -> str:
        """The turns' texts alone."""
        return "\n".join(text for _, text in self.turns)

    def render(self, tokenizer: Any) -> str:
        """The text that a model with this tokenizer is served for the conversation.

        Half of the conversations without a system prompt are given one of `SYSTEM_PROMPTS`, since
        served models see one. A tokenizer with several templates uses one of them, and thinking is
        on for half of the conversations where a template has a switch for it. All is drawn by the
        conversation's content, so that runs with other seeds see the same text. Where a template
        refuses a system prompt or the roles, the turns go without; without any template that takes
        them they are plain text.
        """
        if not getattr(tokenizer, "chat_template", None):
            return self.text
        template = self._template(tokenizer)
        prompted = self._with_system_prompt()
        for turns in dict.fromkeys((prompted, self.turns)):
            for options in (template, {}):
                rendered = _rendered(tokenizer, turns, options)
                if rendered is not None:
                    return rendered
        return self.text

    def _draw(self, number: int) -> int:
        """A number of 64 bits that the content decides, another one for each `number` below 4."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return int.from_bytes(digest[8 * number : 8 * number + 8], "big")

    def _template(self, tokenizer: ChatTokenizer) -> dict[str, Any]:
        """Which template of the tokenizer is used, and how it is switched."""
        templates, options = tokenizer.chat_template, {}
        if isinstance(templates, dict):
            names = sorted(templates)
            options["chat_template"] = names[self._draw(1) % len(names)]
            templates = templates[options["chat_template"]]
        is_on = self._draw(2) % 2 == 0
        return options | {name: is_on for name in SWITCHES if _mentions(templates, name)}

    def _with_system_prompt(self) -> tuple[tuple[str, str], ...]:
        if self.turns[0][0] == "system":
            return self.turns
        draw = self._draw(0)
        if draw / 2**64 >= SYSTEM_SHARE:
            return self.turns
        return (("system", SYSTEM_PROMPTS[draw % len(SYSTEM_PROMPTS)]), *self.turns)


def _turn(turn: Any, role: str, content: str) -> tuple[str, str] | None:
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
        return None
    name = turn[role].lower()
    return _ROLES.get(name, name), content_text(turn.get(content))


def content_text(content: Any) -> str:
    """The text of a turn, whose content may be a list of typed parts."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, dict) else part for part in parts)
    return "\n".join(text for text in texts if isinstance(text, str))


def _mentions(template: Any, name: str) -> bool:
    return isinstance(template, str) and re.search(rf"\b{name}\b", template) is not None


def _rendered(
    tokenizer: ChatTokenizer, turns: Sequence[tuple[str, str]], options: Mapping[str, Any]
) -> str | None:
    """The conversation with contents as texts, or as typed parts where the texts are lost.

    A template that walks the parts of a content finds single letters in a text, and none of them
    has a type.
    """
    plain = [{"role": role, "content": text} for role, text in turns]
    found = apply_template(tokenizer, plain, options)
    if found is not None and _kept(turns, found) == len(turns):
        return found
    typed = [{"role": role, "content": [_part(text)]} for role, text in turns]
    other = apply_template(tokenizer, typed, options)
    if other is None or _kept(turns, other) <= (-1 if found is None else _kept(turns, found)):
        return found
    return other


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _kept(turns: Sequence[tuple[str, str]], rendered: str) -> int:
    """How many turns a rendered conversation holds; templates may trim them."""
    return sum(text.strip() in rendered for _, text in turns)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
