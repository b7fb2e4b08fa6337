"""The tokens of a data loader: whatever its batches are, what the model is called with.

Shapes: B sequences, L tokens.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from torch import Tensor

from autoquant.data.passages import Row
from autoquant.data.tokens import Split, batched
from autoquant.errors import ConfigError

Step = Callable[[Any, Any], Any]
"""Calls a model with a batch."""

BATCH_TOKENS = 4_096
"""Of one forward of the search."""


class _Seen(Exception):
    """The model was called; nothing has to be computed."""

    def __init__(self, ids: Any, mask: Any) -> None:
        self.ids, self.mask = ids, mask


def splits_of(
    model: Any, loader: Iterable[Any], step: Step, *, calibration: int, scored: int
) -> dict[str, Split]:
    """Cut the sequences of a data loader into `calibration`, `search` and `report`.

    ModelOpt calibrates on the first batches and scores the first ones once more. The same here:
    `calibration` and `search` begin at the first batch. What comes after those of `search`, up to
    as many again, is `report`; a loader that ends before is halved between the two. A sequence that
    was searched on is never reported on.

    Args:
        model: to see what it is called with; nothing is computed.
        loader: read once.
        step: as `forward_step` of `mtq.auto_quantize`.
        calibration: most batches to calibrate on.
        scored: most batches to search on.

    Raises:
        ConfigError: the model is not called with token ids, or there are fewer than two sequences.
    """
    batches = list(islice(iter(loader), max(calibration, 2 * scored)))
    rows = [_rows(model, step, batch) for batch in batches]
    of_search = min(scored, max(1, len(rows) // 2))
    searched = _distinct(row for own in rows[:of_search] for row in own)
    reported = _distinct(row for own in rows[of_search : 2 * of_search] for row in own)
    fresh = [row for row in reported if row not in set(searched)]
    parts = {
        "calibration": _distinct(row for own in rows[:calibration] for row in own),
        "search": searched,
        "report": fresh,
    }
    for name, own in parts.items():
        if not own:
            raise ConfigError(
                f"the data loader leaves no sequence for the {name} tokens: {len(batches)} batches "
                f"hold {len(_distinct(row for one in rows for row in one))} different sequences.",
                fix="let it yield at least two batches of different sequences.",
            )
    return {name: _split(name, own) for name, own in parts.items()}


def _split(name: str, sequences: list[tuple[int, ...]]) -> Split:
    rows = [Row(tokens, number, number) for number, tokens in enumerate(sequences)]
    return batched(name, rows, BATCH_TOKENS)


def _distinct(rows: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(rows))


def _rows(model: Any, step: Step, batch: Any) -> list[tuple[int, ...]]:
    """The sequences of one batch without their padding; those of a single token are left out."""
    ids, mask = _called_with(model, step, batch)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ConfigError(
            "forward_step does not call the model with input_ids of shape [B, L].",
            fix="call model(input_ids=...) or model(**batch); the search measures token by token.",
        )
    is_padded = isinstance(mask, Tensor) and mask.shape == ids.shape
    rows = [row[own.bool()] for row, own in zip(ids, mask, strict=True)] if is_padded else ids
    return [tuple(row.tolist()) for row in rows if len(row) > 1]


def _called_with(model: Any, step: Step, batch: Any) -> tuple[Any, Any]:
    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(
            kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        )

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        step(model, batch)
    except _Seen as seen:
        return seen.ids, seen.mask
    finally:
        handle.remove()
    return None, None
