"""The isolated KL of every (group, choice) to second order, from one forward and backward a batch.

To second order KL(p || q) = 1/2 Var_p(dz) of the logit change dz. With v = sqrt(p) * xi -
p <sqrt(p), xi>, xi standard normal, E[v v^T] is that variance's matrix, so that half the square of
<v, dz> estimates the KL: v is what sampled labels' gradients of the log-likelihood tend to when
many are combined with random signs (the Fisher factor; Martens, 2020). One backward
pass gives g, the gradient of <v, z> for a product y, and <v, dz> is the sum of g * dy over its
elements.

That sum is squared over windows of adjacent tokens of a sequence, of all elements of the group: per
element, as a diagonal Fisher has it, leaves out what elements have in common and errs by a third;
over a whole sequence there are too few squares to average.

What it leaves out: terms of higher order, the re-rounding of everything behind the group, and
tokens that a router behind it sends to other experts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from autoquant.data.tokens import Split
from autoquant.errors import AutoQuantError, first_line
from autoquant.forward.backward import Backward, pieces_of
from autoquant.forward.flow import Flow, loop
from autoquant.forward.taps import Taps
from autoquant.measure.compare import Ahead
from autoquant.measure.interactions import Key
from autoquant.measure.method import ProbeMethod
from autoquant.measure.ranks.together import together
from autoquant.measure.scorer import Scorer
from autoquant.measure.sensitivity import BatchProbe, Sensitivity, batch_probe, summarize

EFFECTS_AT_ONCE = 2**24
"""Effects of tokens whose estimates are worked out together."""

WINDOW = 8
"""Adjacent tokens whose effects are summed before they are squared."""


class NoGradient(Exception):
    """The model's backward pass does not serve; the message says why in a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchEstimate:
    """The estimates of all keys on one batch: the unit that is written to disk."""

    batch: int
    probes: tuple[BatchProbe, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": str(ProbeMethod.GRADIENT),
            "batch": self.batch,
            "probes": [probe.to_dict() for probe in self.probes],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BatchEstimate":
        return cls(
            batch=data["batch"], probes=tuple(BatchProbe.from_dict(p) for p in data["probes"])
        )


def gradient_probe(
    scorer: Scorer,
    split: Split,
    keys: Sequence[Key],
    done: Iterable[BatchEstimate],
    keep: Callable[[BatchEstimate], None],
    *,
    seed: int,
    with_noise: bool = False,
) -> list[BatchEstimate]:
    """Estimate every key on every batch that is not done yet.

    Args:
        scorer: calibrated.
        split: the search tokens.
        keys: (group, choice) pairs, BF16 excluded.
        done: estimates of an earlier process with the same keys and seed.
        keep: called with each new batch before the next begins.
        seed: of the random factors.
        with_noise: measure what the scorer's `noise` says on the way.

    Returns:
        The estimates of each batch.

    Raises:
        NoGradient: an architecture or a kernel without a backward pass.
    """
    results = {estimate.batch: estimate for estimate in done}
    missing = [batch for batch in range(len(split.batches)) if batch not in results]
    for wave in scorer.waves(split, missing, forwards=scorer.trunk.stages):
        for estimate in estimate_batches(scorer, split, wave, keys, seed, with_noise):
            results[estimate.batch] = estimate
            keep(estimate)
    return list(results.values())


def ahead_of_gradients(
    scorer: Scorer, split: Split, batches: Sequence[int], *, with_noise: bool, beside: Split
) -> Ahead | None:
    """What gradients need of the BF16 model, if it may go along in a pass over another split.

    Where weights are brought for every pass, that saves one. Memory has to hold the states between
    all blocks until the gradients are measured.

    Args:
        scorer: of the model.
        split: the tokens of the gradients.
        batches: of it.
        with_noise: whether the scorer's `noise` will be asked for.
        beside: the tokens of the pass.
    """
    others = states_of(scorer, beside, range(len(beside.batches)))
    states = scorer.trunk.stages * states_of(scorer, split, batches) + others
    if not scorer.room.is_streamed or states > scorer.room.walk_bytes:
        return None
    return Ahead(split=split, batches=tuple(batches), with_noise=with_noise)


def states_of(scorer: Scorer, split: Split, batches: Sequence[int]) -> int:
    """Bytes of the states between two blocks of a rank's share of batches."""
    return sum(scorer.state_bytes(split, index) for index in batches[:: scorer.ranks.size])


def mean_estimate(
    keys: Sequence[Key], split: Split, estimates: Iterable[BatchEstimate]
) -> Sensitivity:
    """The estimates of all keys over the tokens of some batches of `split`."""
    return Sensitivity(*summarize(keys, split, (p for e in estimates for p in e.probes)))


@together
def estimate_batches(
    scorer: Scorer,
    split: Split,
    batches: Sequence[int],
    keys: Sequence[Key],
    seed: int,
    with_noise: bool = False,
) -> list[BatchEstimate]:
    """Estimate every key on some batches, each dealt to a rank.

    Raises:
        NoGradient: an architecture or a kernel without a backward pass.
    """
    own = scorer.ranks.dealt(batches)
    return scorer.ranks.gathered(lambda: [*_estimates(scorer, split, own, keys, seed, with_noise)])


def _estimates(
    scorer: Scorer,
    split: Split,
    batches: Sequence[int],
    keys: Sequence[Key],
    seed: int,
    with_noise: bool,
) -> Iterator[BatchEstimate]:
    """Estimate the groups inside blocks; behind them, in the head, the exact KL costs no more."""
    head = {group.name for group in scorer.quantized.groups if group.layer is None}
    inside = [key for key in keys if key[0] not in head]
    behind = [key for key in keys if key[0] in head]
    flows = scorer.bf16_states(split, batches, with_noise=with_noise)
    effects = _effects(scorer, flows, batches, inside, seed) if inside else [{} for _ in flows]
    for batch, flow, found in zip(batches, flows, effects, strict=True):
        probes = [*_of_effects(batch, {key: found[key] for key in inside})]
        scores = scorer.probe_head(flow, split, batch, behind)
        probes += [batch_probe(batch, *key, s) for key, s in zip(behind, scores, strict=True)]
        yield BatchEstimate(batch=batch, probes=tuple(probes))


def _of_effects(batch: int, effects: Mapping[Key, torch.Tensor]) -> Iterator[BatchProbe]:
    """The estimate of every key on a batch, of the effects of its tokens [B, L].

    Many keys at a time: a GPU waits for each of its steps, and the host for each answer.
    """
    keys = [*effects]
    most = max(1, EFFECTS_AT_ONCE // max((own.numel() for own in effects.values()), default=1))
    for first in range(0, len(keys), most):
        own = keys[first : first + most]
        stacked = torch.stack([effects[key] for key in own])
        count, sequences, length = stacked.shape
        found = _kl_of_sequences(stacked.flatten(0, 1)).view(count, sequences).cpu()
        for (group, choice), kl in zip(own, found, strict=True):
            if not torch.isfinite(kl).all():
                raise NoGradient(f"the gradient at {group} is not finite")
            yield BatchProbe(
                batch=batch,
                group=group,
                choice=choice,
                kl_sum=float(kl.sum()),
                tokens=sequences * length,
                sequence_kl=tuple((kl / length).tolist()),
            )


def _effects(
    scorer: Scorer, flows: Sequence[Flow], batches: Sequence[int], keys: Sequence[Key], seed: int
) -> list[dict[Key, torch.Tensor]]:
    """<v, dz> through each token's products, float32 [B, L], of each batch and key."""
    pieces = [pieces_of(scorer.trunk, scorer.room, flow) for flow in flows]
    tokens = [[p.tokens for part in own for p in part] for own in pieces]
    taps = [[Taps(scorer.quantized, keys, t.numel()) for t in own] for own in tokens]
    with backward_passes():
        visitors = [
            Backward(
                scorer.trunk,
                scorer.room,
                flow,
                apart,
                [tap.installed for tap in own],
                random_pull(scorer, seed, batch),
            )
            for flow, apart, own, batch in zip(flows, pieces, taps, batches, strict=True)
        ]
        loop(scorer.trunk, visitors, backwards=True)
    for group, choice in keys:
        if any((group, choice) not in tap.effects for own in taps for tap in own):
            raise NoGradient(f"no gradient reaches {group}")
    return [
        {
            key: torch.cat(
                [tap.effects[key].view(t.shape) for tap, t in zip(own, apart, strict=True)]
            )
            for key in keys
        }
        for own, apart in zip(taps, tokens, strict=True)
    ]


@contextmanager
def backward_passes() -> Iterator[None]:
    """Raise `NoGradient` where the backward passes inside fail.

    Raises:
        NoGradient: an architecture or a kernel has none.
    """
    try:
        yield
    except (AutoQuantError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # model code and custom kernels raise anything
        if "DefaultCPUAllocator" in str(error):
            raise
        raise NoGradient(first_line(error)) from error


def random_pull(scorer: Scorer, seed: int, batch: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the final hidden states of a batch's parts, in turn, to the gradient of <v, logits>."""
    generator = torch.Generator(scorer.device).manual_seed((seed * 1_000_003 + batch) % 2**63)
    return lambda hidden: scorer.head.pull_back(hidden, lambda z: _factor(z, generator))


def _factor(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random v [T, V] with E[v v^T] = diag(p) - p p^T for p = softmax(logits [T, V]), which are
    overwritten.
    """
    p = logits.softmax(dim=-1)
    scaled = logits.normal_(generator=generator).mul_(p.sqrt())
    return scaled.sub_(p.mul_(scaled.sum(dim=-1, keepdim=True)))


def _kl_of_sequences(effects: torch.Tensor) -> torch.Tensor:
    """KL of each sequence, nats, float64 [B], of effects [B, L]."""
    padded = functional.pad(effects.double(), (0, -effects.shape[1] % WINDOW))
    windows = padded.view(len(effects), -1, WINDOW).sum(dim=2)
    return windows.square().sum(dim=1) / 2
