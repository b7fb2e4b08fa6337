"""How often a search passes over weights that are streamed, before it begins.

The parts have the names of `work.jsonl`, which says how often it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autoquant.codes.statistics_size import groups_with_moments
from autoquant.measure.method import ProbeMethod
from autoquant.measure.racing.local import FIRST_WAVE
from autoquant.measure.screen import measured_batches
from autoquant.measure.sensitivity import keys_of
from autoquant.plan.plan import Plan
from autoquant.run.config import PlanConfig
from autoquant.run.signature import FINALISTS
from autoquant.search.propose.baselines import recipes
from autoquant.search.propose.predicted import REFIT_EVERY
from autoquant.search.propose.scale_rules import ways_among
from autoquant.search.propose.shares import Effort

_OPTIMA = 3
"""Optima of the solver at most: of probes, of gradients, of one scale rule."""
_STATE_BYTES = 2
"""Of an element of a state between two blocks."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Of one part of a search."""

    passes: int
    is_most: bool = False
    """Whether what is measured decides, so that it may be fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What decides how many forwards go through the blocks together."""

    stages: int
    width: int
    """Elements of a token's state."""
    state_bytes: int
    """Memory for states between blocks."""


def forecast_passes(config: PlanConfig, plan: Plan, streaming: Streaming) -> dict[str, Passes]:
    """Passes over the blocks of each part of a search with these settings, in its order.

    Args:
        config: with the settings of the search.
        plan: what it names, opened.
        streaming: of the model on its machine.
    """
    waves = _waves(config, streaming)
    found = {
        "load": Passes(1),
        "calibrate": Passes(waves(_batches(config, config.calibration_tokens), 1)),
    }
    if groups_with_moments(plan.options.choices, tuple(plan.groups)):
        found["statistics"] = Passes(1)
    found["probe"] = _of_probes(config, plan, waves, streaming)
    found |= _of_trials(config, plan, waves, streaming)
    report = _batches(config, config.report_tokens)
    most = 1 + FINALISTS + len(recipes())
    found["confirm"] = Passes(waves(report, most), is_most=True)
    if config.effort.polishes:
        found["polish"] = Passes(1 + waves(report, 1), is_most=True)
    return found


def states_of_gradients(config: PlanConfig, streaming: Streaming, *, is_streamed: bool) -> int:
    """Bytes of the states between all blocks that gradients begin with: of all batches where a pass
    brings the weights, and else of one.
    """
    batches = _batches(config, config.search_tokens) if is_streamed else 1
    return streaming.stages * batches * _bytes_of_batch(config, streaming)


_Waves = Callable[[int, int], int]
"""Passes of so many batches, with so many forwards of each."""


def _batches(config: PlanConfig, tokens: int) -> int:
    """Batches of a split, as far as the text has sequences of full length."""
    return math.ceil(math.ceil(tokens / config.longest) / _sequences_of_batch(config))


def _sequences_of_batch(config: PlanConfig) -> int:
    return max(1, config.batch_tokens // config.longest)


def _bytes_of_batch(config: PlanConfig, streaming: Streaming) -> int:
    return _sequences_of_batch(config) * config.longest * streaming.width * _STATE_BYTES


def _waves(config: PlanConfig, streaming: Streaming) -> _Waves:
    each = _bytes_of_batch(config, streaming)

    def waves(batches: int, forwards: int) -> int:
        together = max(1, streaming.state_bytes // (each * forwards))
        return math.ceil(batches / together)

    return waves


def _of_probes(config: PlanConfig, plan: Plan, waves: _Waves, streaming: Streaming) -> Passes:
    """Gradients forward, unless that went along with the calibration, and back; exact probes, as
    many together as fit.
    """
    batches = _batches(config, config.search_tokens)
    together = max(1, streaming.state_bytes // _bytes_of_batch(config, streaming))
    keys = [*keys_of(plan.options.choices)]
    if config.probe is ProbeMethod.EXACT:
        return Passes(math.ceil(len(keys) * batches / together))
    gradients = 2 * waves(batches, streaming.stages) - _goes_ahead(config, streaming)
    if config.probe is ProbeMethod.GRADIENT:
        return Passes(gradients)
    exact = len({group for group, _ in keys}) * len(measured_batches(batches))
    return Passes(gradients + math.ceil(exact / together))


def _goes_ahead(config: PlanConfig, streaming: Streaming) -> bool:
    """Whether what gradients need of the BF16 model goes along with the calibration."""
    search = _batches(config, config.search_tokens)
    forwards = streaming.stages * search + _batches(config, config.calibration_tokens)
    return forwards * _bytes_of_batch(config, streaming) <= streaming.state_bytes


def _of_trials(
    config: PlanConfig, plan: Plan, waves: _Waves, streaming: Streaming
) -> Mapping[str, Passes]:
    """What is given, together; then the optimum of what passed the check; then the refinement.
    Each is a pass where the states of all its forwards fit.
    """
    batches = _batches(config, config.search_tokens)
    pairs = max(1, streaming.state_bytes // _bytes_of_batch(config, streaming))
    ways = len(ways_among(plan.options.choices.values()))
    given = len(recipes()) + _OPTIMA + (ways if ways > 1 else 0)
    solved = sum(waves(batches, own) for own in _shares(given, pairs))
    return {
        "solve": Passes(solved + (ways > 1), is_most=True),
        "refine": Passes(_of_refinement(config, waves, batches, pairs), is_most=True),
    }


def _of_refinement(config: PlanConfig, waves: _Waves, batches: int, pairs: int) -> int:
    """Races by waves: the first batches of all that are known to come, then the other batches.

    The order of runners-up is known, and that of refits until they are fitted again; swaps are
    others after each that is better than the best before it.

    Args:
        config: says how many trials, and how many at a time.
        waves: of batches with so many forwards each.
        batches: of search tokens.
        pairs: forwards of a batch that go together.
    """
    effort, width = Effort.of(config.trials), config.trials_at_once
    first = math.ceil(FIRST_WAVE * batches)
    rounds = [
        own
        for count, most in (
            (effort.runners_up, effort.runners_up),
            (effort.refit, REFIT_EVERY),
            (effort.swaps, width),
        )
        for known in _shares(count, most)
        for own in _shares(known, max(width, pairs // first))
    ]
    return sum(waves(part, own) for own in rounds for part in (first, batches - first))


def _shares(count: int, most: int) -> Iterator[int]:
    """A number in parts of `most`, the last of which may be smaller; none of nothing."""
    return (min(most, left) for left in range(count, 0, -max(1, most)))
