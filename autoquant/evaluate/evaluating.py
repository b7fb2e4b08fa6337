"""Tasks run on one assignment of a session."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.evaluate.harness import harness, quiet
from autoquant.evaluate.scores import Metric, TaskScore
from autoquant.measure.session import Session
from autoquant.plan.assignment import Assignment
from autoquant.progress import Progress

_PLAIN = "none"
"""The harness' name of a filter that changes nothing."""

_EXACT = 1e-9
"""How near a figure is to the mean over its items where it is that mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How tasks are asked, the same for every assignment."""

    limit: int | None
    """First items of each task; None for all."""
    is_chat: bool
    """Whether prompts are written in the model's own chat format."""
    seed: int
    """Of the examples before an item."""
    batch_tokens: int


def evaluate(
    session: Session,
    assignment: Assignment,
    tasks: Mapping[str, Any],
    terms: Terms,
    *,
    name: str,
    with_cache: bool,
    observer: Progress,
) -> list[TaskScore]:
    """Run tasks on an assignment.

    Args:
        session: calibrated.
        assignment: what the model multiplies with.
        tasks: as `open_tasks` gives them.
        terms: how they are asked.
        name: of the assignment.
        with_cache: whether keys and values are rounded, where there is such a cache.
        observer: told of progress.

    Raises:
        SourceError: the model's chat template is asked for and refuses.
    """
    from autoquant.evaluate.language_model import ScoredModel

    model = ScoredModel(
        session,
        assignment,
        with_cache=with_cache,
        batch_tokens=terms.batch_tokens,
        observer=observer,
        name=name,
    )
    for task in tasks.values():
        task.set_fewshot_seed(seed=terms.seed)
    with quiet():
        found = harness("evaluator").evaluate(
            lm=model,
            task_dict={"tasks": dict(tasks), "groups": {}},
            limit=terms.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=terms.is_chat,
        )
    return [
        TaskScore(
            name=name,
            assignment=assignment.digest,
            task=task,
            items=len({sample["doc_id"] for sample in samples}),
            digest=_digest(samples),
            shots=tasks[task].get_config("num_fewshot"),
            metrics=tuple(_metrics(found, task, samples)),
        )
        for task, samples in found["samples"].items()
    ]


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """Of the items, their prompts and their answers."""
    rows = sorted(
        {(s["doc_id"], s["doc_hash"], s["prompt_hash"], s["target_hash"]) for s in samples}
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _metrics(
    found: Mapping[str, Any], task: str, samples: Sequence[Mapping[str, Any]]
) -> list[Metric]:
    higher = found["higher_is_better"].get(task) or {}
    metrics = []
    for key, value in found["results"][task].items():
        name, _, filter = str(key).partition(",")
        if not isinstance(value, (int, float)) or not filter or name.endswith("_stderr"):
            continue
        own = sorted((s for s in samples if s["filter"] == filter), key=lambda s: s["doc_id"])
        metrics.append(
            Metric(
                name=name if filter == _PLAIN else f"{name} ({filter})",
                value=float(value),
                higher_is_better=bool(higher.get(name, True)),
                items=_items([sample.get(name) for sample in own], float(value)),
            )
        )
    return metrics


def _items(values: Sequence[Any], mean: float) -> tuple[float, ...]:
    """What each item contributes to a mean; nothing of a figure that is none."""
    if not values or not all(isinstance(value, (bool, int, float)) for value in values):
        return ()
    numbers = tuple(map(float, values))
    return numbers if abs(sum(numbers) / len(numbers) - mean) < _EXACT else ()
