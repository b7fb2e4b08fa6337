"""Exact probes of one choice of each group, the others scaled to it by their gradient estimates.

A probe's KL has a part that grows with the square of the change, which gradients estimate, and one
that grows with its size: tokens sent to other experts, values rounded anew. With the anchor's exact
KL k and estimates e of the anchor and e' of another choice, the other's KL is

    e' + (k - e) sqrt(e' / e),   or k e' / e where the exact KL is the smaller.

NVFP4 is probed under the scale rule of the least estimate.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from autoquant.probe.interactions import Interactions, Key
from autoquant.probe.sensitivity import Sensitivity


def anchors(keys: Iterable[Key], estimate: Sensitivity) -> dict[str, Key]:
    """The (group, choice) of each group that is worth an exact probe.

    Args:
        keys: (group, choice) pairs, the cheapest format of a group first.
        estimate: by gradients, of all keys.
    """
    found: dict[str, Key] = {}
    for key in keys:
        anchor = found.setdefault(key[0], key)
        if key[1].format is anchor[1].format and estimate[key] < estimate[anchor]:
            found[key[0]] = key
    return found


def scaled(keys: Sequence[Key], estimate: Sensitivity, exact: Sensitivity) -> Sensitivity:
    """Sensitivities of all keys from the anchors' exact ones.

    Standard errors stay in proportion. Another scale rule interacts with other groups as the
    anchor's does; of another format that is not known.
    """
    anchor_of = anchors(keys, estimate)
    kl = {key: _scaled(key, anchor_of[key[0]], estimate, exact) for key in keys}
    stderr = {
        key: exact.stderr[anchor] * kl[key] / exact[anchor] if exact[anchor] > 0.0 else math.nan
        for key in keys
        for anchor in (anchor_of[key[0]],)
    }
    return Sensitivity(kl, stderr, _interactions(keys, anchor_of, exact.interactions))


def _scaled(key: Key, anchor: Key, estimate: Sensitivity, exact: Sensitivity) -> float:
    if key == anchor or estimate[anchor] <= 0.0:
        return exact[anchor]
    excess, ratio = exact[anchor] - estimate[anchor], estimate[key] / estimate[anchor]
    return estimate[key] + excess * math.sqrt(ratio) if excess > 0.0 else exact[anchor] * ratio


def _interactions(
    keys: Sequence[Key], anchor_of: Mapping[str, Key], measured: Interactions | None
) -> Interactions | None:
    if measured is None:
        return None
    proxies = []
    for key in keys:
        anchor = anchor_of[key[0]]
        proxies.append(anchor if key[1].format is anchor[1].format else key)
    return Interactions(tuple(keys), measured.of(proxies))
