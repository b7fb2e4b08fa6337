"""A process that renders chat templates, run as a script by `autoquant.data.templates`.

A template is a program that comes with a model. Here it can take no more than the limits given:
when it takes more, this process ends and no other. Each line of standard input is a JSON object,
the arguments of transformers' `render_jinja_template`; each line of standard output holds the
rendered text, or why there is none.
"""

import json
import signal
import sys
from datetime import datetime, tzinfo
from typing import Any, Self

from transformers.utils import chat_template_utils

if sys.platform != "win32":  # which has no such limits
    import resource


class _NewYear(datetime):
    """What templates are told that the time is: they give the same text on any day."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        """Midday of the first of January 2026."""
        return cls(2026, 1, 1, 12, tzinfo=tz)


def main(seconds: int, memory: int) -> None:
    """Answer until standard input ends.

    Args:
        seconds: of processor time for one text.
        memory: bytes of address space.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks ends this process when it ends
    chat_template_utils.datetime = _NewYear  # type: ignore[attr-defined]
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        if sys.platform != "win32":
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(arguments: dict[str, Any]) -> dict[str, str]:
    try:
        rendered: Any = chat_template_utils.render_jinja_template(**arguments)
        (text,), _ = rendered
        text.encode()
    except MemoryError:
        return {"exceeded": "memory"}
    except Exception as error:  # a template raises anything
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"text": text}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
