"""Chat templates, rendered where they can do no harm.

A chat template is a Jinja program that comes with a model. One that loops for ever, or that
multiplies a text by itself, cannot be stopped inside a thread; it is rendered by a process of its
own, which is killed by the limits on processor time and memory that the system keeps for it.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.errors import SourceError

if TYPE_CHECKING:
    from jinja2.ext import Extension


class TemplateProcess:
    """Renders one conversation at a time, for any thread.

    Args:
        seconds: of processor time for one conversation; published templates take milliseconds.
        memory: bytes of address space, of which Python and transformers take 150 MB.
    """

    def __init__(self, *, seconds: int = 5, memory: int = 2**30) -> None:
        self._limits = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, arguments: Mapping[str, Any], origin: str) -> str | None:
        """The text, or None where the template refuses the conversation or fails on it.

        Args:
            arguments: of transformers' `render_jinja_template`, for one conversation.
            origin: whose template it is.

        Raises:
            SourceError: the template exceeds its limits.
        """
        with self._lock:
            answer = self._ask(json.dumps(arguments, default=str))
        if "exceeded" in answer:
            seconds, memory = self._limits
            raise SourceError(
                f"the chat template of {origin} takes more than {seconds} s of processor time or "
                f"{memory:,} bytes for one conversation ({answer['exceeded']}).",
                fix="mend chat_template.jinja, or calibrate on plain text.",
            )
        return answer.get("text")

    def _ask(self, question: str) -> dict[str, str]:
        if self._process is None:
            script = Path(__file__).with_name("template_process.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(script), *map(str, self._limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        self._process = None
        process.communicate()
        return {"exceeded": f"its process ended with {process.returncode}"}


def why_no_template(template: str) -> str | None:
    """Why transformers cannot compile a text as a chat template, or None. Nothing is rendered."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols, _generation()])
    try:
        environment.parse(template)
    except jinja2.TemplateSyntaxError as error:
        return f"is no chat template: {error.message} at line {error.lineno}"
    except RecursionError:
        return "is no chat template: it is nested too deep"
    return None


def _generation() -> "type[Extension]":
    """The tag `generation`, which marks what the assistant says; transformers' own is private."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


@cache
def _template_process(parent: int) -> TemplateProcess:
    """The one of the process `parent`, with which it ends; a fork starts its own."""
    return TemplateProcess()


def apply_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> str | None:
    """What `tokenizer.apply_chat_template` gives as text, or None where it refuses or fails.

    A tokenizer with code of its own in place of that method is asked itself.

    Args:
        tokenizer: transformers', with a chat template.
        messages: one conversation.
        options: for the template; `chat_template` chooses among several by name.

    Raises:
        SourceError: the template exceeds its limits.
    """
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # code that comes with a model raises anything
            return None
    variables = dict(options)
    try:
        template = tokenizer.get_chat_template(variables.pop("chat_template", None))
    except ValueError:  # several, and none is the default
        return None
    arguments = {
        "conversations": [messages],
        "chat_template": template,
        **tokenizer.special_tokens_map,
        **variables,
    }
    return _template_process(os.getpid()).render(arguments, tokenizer.name_or_path)
