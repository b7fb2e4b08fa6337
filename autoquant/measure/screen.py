"""Exact probes of one choice of each group, the others scaled to it by their gradient estimates.

A probe's KL has a part that grows with the square of the change, which gradients estimate, and one
that grows with its size: tokens sent to other experts, values rounded anew. With the anchor's exact
KL k and estimates e of the anchor and e' of another choice, the other's KL is

    e' + (k - e) sqrt(e' / e),   or k e' / e where the exact KL is the smaller.

NVFP4 is probed under the scale rule of the least estimate. Groups that together do less than the
noise of two BF16 runs keep their estimates.

Exact probes run on every second batch. They and the estimates grow and shrink together from token
to token, so their ratio there times the estimate on all tokens is about as precise (the ratio
estimator; Cochran, Sampling Techniques, 1977, chapter 6).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from autoquant.measure.interactions import Interactions, Key
from autoquant.measure.sensitivity import Sensitivity

EXCESS = 8.0
"""An exact KL is taken to be below so many times its estimate. On the bundled mixture of experts it
is at most 4.8 times the estimate, in the blocks before the most routers."""


def measured_batches(batches: int) -> range:
    """Every second batch: the ones that exact probes run on."""
    return range(0, batches, 2)


def anchors(keys: Iterable[Key], estimate: Sensitivity) -> dict[str, Key]:
    """The (group, choice) of each group that is worth an exact probe.

    Args:
        keys: (group, choice) pairs, the cheapest format of a group first.
        estimate: by gradients, of all keys.
    """
    found: dict[str, Key] = {}
    for key in keys:
        anchor = found.setdefault(key[0], key)
        is_less = estimate[key] < estimate[anchor] or not math.isfinite(estimate[anchor])
        if key[1].format is anchor[1].format and is_less:
            found[key[0]] = key
    return found


def negligible(probes: Iterable[Key], estimate: Sensitivity, floor: float) -> frozenset[Key]:
    """The probes of least estimate that together stay below the noise floor.

    Args:
        probes: one of each group.
        estimate: by gradients, of all of them; `EXCESS` times it bounds a probe's KL.
        floor: mean KL between two BF16 runs, nats per token.
    """
    found, total = [], 0.0
    finite = (key for key in probes if math.isfinite(estimate[key]))
    for key in sorted(finite, key=lambda key: estimate[key]):
        total += EXCESS * estimate[key]
        if total >= floor:
            break
        found.append(key)
    return frozenset(found)


def scaled(
    keys: Sequence[Key], anchor_of: Mapping[str, Key], estimate: Sensitivity, exact: Sensitivity
) -> Sensitivity:
    """Sensitivities of all keys from the anchors' exact ones; without one, the estimates.

    Standard errors stay in proportion, and every choice of a group interacts with other groups as
    its anchor does: on the bundled reference model that predicts joint KL as well as sketches of
    every choice do.

    Args:
        keys: (group, choice) pairs.
        anchor_of: the probed pair of each group.
        estimate: by gradients, of all keys, on the tokens of the exact probes.
        exact: of the anchors that were probed.
    """
    kl = {key: _scaled(key, anchor_of[key[0]], estimate, exact) for key in keys}
    stderr = {key: _relative_error(anchor_of[key[0]], estimate, exact) * kl[key] for key in keys}
    return Sensitivity(kl, stderr, _interactions(keys, anchor_of, exact.interactions), estimate.kl)


def carried_over(part: Sensitivity, beside: Sensitivity, estimate: Sensitivity) -> Sensitivity:
    """Sensitivities on all tokens, of those on a part of them.

    Args:
        part: on a part of the tokens.
        beside: gradients' estimates on that part.
        estimate: gradients' estimates on all tokens.
    """
    ratio = {key: estimate[key] / beside[key] if beside[key] > 0.0 else 1.0 for key in part.kl}
    kl = {key: ratio[key] * value for key, value in part.kl.items()}
    stderr = {key: ratio[key] * value for key, value in part.stderr.items()}
    return Sensitivity(kl, stderr, part.interactions, estimate.kl)


def _relative_error(anchor: Key, estimate: Sensitivity, exact: Sensitivity) -> float:
    """Standard error of a group's probe over its KL."""
    source = exact if anchor in exact.kl else estimate
    return source.stderr[anchor] / source[anchor] if source[anchor] > 0.0 else math.nan


def _scaled(key: Key, anchor: Key, estimate: Sensitivity, exact: Sensitivity) -> float:
    if anchor not in exact.kl:
        return estimate[key]
    if key != anchor and not math.isfinite(exact[anchor]):
        return estimate[key]  # an overflow says nothing of the other choices
    if key == anchor or not 0.0 < estimate[anchor] < math.inf:
        return exact[anchor]
    excess, ratio = exact[anchor] - estimate[anchor], estimate[key] / estimate[anchor]
    return estimate[key] + excess * math.sqrt(ratio) if excess > 0.0 else exact[anchor] * ratio


def _interactions(
    keys: Sequence[Key], anchor_of: Mapping[str, Key], measured: Interactions | None
) -> Interactions | None:
    if measured is None:
        return None
    return Interactions(tuple(keys), measured.of([anchor_of[group] for group, _ in keys]))
