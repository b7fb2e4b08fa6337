"""lm-evaluation-harness as it is installed, without its own progress and logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from autoquant.environment import extra
from autoquant.model.replacing import replaced


def harness(module: str) -> Any:
    """A module of lm-evaluation-harness; the first takes seconds.

    Raises:
        ConfigError: it is not installed.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return extra(f"lm_eval.{module}", "evaluate", title="lm-evaluation-harness")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the harness' own progress bars inside; ours tell how far the model is."""
    task, model = harness("api.task"), harness("api.model")
    hidden = partial(task.tqdm, disable=True)
    with replaced([(task, "tqdm", hidden)]), replaced([(model, "tqdm", _as_given)]):
        yield


def _as_given(values: Any, **_: Any) -> Any:
    return values
