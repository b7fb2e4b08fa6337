"""How often a search passes over its weights, and what it computes, before it begins.

The parts have the names of `work.jsonl`, which says how often it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from autoquant.codes.statistics_size import groups_with_moments
from autoquant.measure.method import ProbeMethod
from autoquant.measure.race import RACE_UNITS
from autoquant.measure.racing.local import FIRST_WAVE
from autoquant.measure.screen import measured_batches
from autoquant.measure.sensitivity import keys_of
from autoquant.model.streaming.work import KEPT_LOGIT_BYTES
from autoquant.plan.linears import LayerGroup
from autoquant.plan.plan import Plan
from autoquant.run.config import PlanConfig
from autoquant.run.machines.computed import NOTHING, ChoicesOfGroups, Computed
from autoquant.run.signature import FINALISTS
from autoquant.search.propose.baselines import recipes
from autoquant.search.propose.predicted import REFIT_EVERY
from autoquant.search.propose.scale_rules import ways_among
from autoquant.search.propose.shares import Effort

_OPTIMA = 3
"""Optima of the solver at most: of probes, of gradients, of one scale rule."""
_RUN_OF_TRIAL, _RUN_AMONG_OTHERS = 0.9, 0.55
"""Part of the blocks and batches that a trial of the refinement runs, by itself and with others in
a pass, which it leaves at the first group that differs. Measured on the bundled model."""
_STATE_BYTES = 2
"""Of an element of a state between two blocks."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Of one part of a search."""

    passes: int
    is_most: bool = False
    """Whether what is measured decides, so that it may be fewer."""
    usual: int | None = None
    """How many they usually are, where that is not `passes`."""
    computed: Computed = NOTHING
    """What they usually compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """What decides how many forwards go through the blocks together."""

    stages: int
    width: int
    """Elements of a token's state."""
    state_bytes: int
    """Memory for states between blocks."""
    is_streamed: bool
    """Whether every pass brings the weights, and codes have to be made for it."""


def forecast_passes(config: PlanConfig, plan: Plan, streaming: Streaming) -> dict[str, Passes]:
    """Passes over the blocks of each part of a search with these settings, in its order.

    Args:
        config: with the settings of the search.
        plan: what it names, opened.
        streaming: of the model on its machine.
    """
    waves, choices = _waves(config, streaming), ChoicesOfGroups.of(plan)
    batches, ahead = _share(config, config.calibration_tokens), _goes_ahead(config, streaming)
    search = _share(config, config.search_tokens) + _noise(config)
    calibrate = Passes(
        waves(_batches(config, config.calibration_tokens), 1),
        computed=Computed(observed=batches, forwards=search if ahead else 0.0),
    )
    found = {
        "load": Passes(1, computed=Computed(forwards=2 / _sequences_of_batch(config))),
        "calibrate": calibrate,
    }
    if groups_with_moments(plan.options.choices, tuple(plan.groups)):
        found["statistics"], along = _of_statistics(config, streaming)
        found["calibrate"] = replace(calibrate, computed=calibrate.computed + along)
    found["probe"] = _of_probes(config, plan, waves, streaming, choices)
    found |= _of_trials(config, plan, waves, streaming, choices)
    report, shown = _batches(config, config.report_tokens), _share(config, config.report_tokens)
    most, usually = 1 + FINALISTS + len(recipes()), 1 + FINALISTS + _usual_recipes(plan)
    again = choices.plain if streaming.is_streamed else 0.0
    found["confirm"] = Passes(
        waves(report, most),
        is_most=True,
        computed=Computed(
            forwards=shown + 1,
            candidates=usually * shown,
            referred=shown + _not_kept(config, plan, config.report_tokens) * usually * shown,
            scored=usually * shown,
            encoded=again,
        ),
    )
    if config.effort.polishes:
        found["polish"] = Passes(1 + waves(report, 1), is_most=True)
    return found


def states_of_gradients(config: PlanConfig, streaming: Streaming, *, is_weighed: bool) -> int:
    """Bytes of the states between all blocks that gradients begin with: of all batches where a pass
    brings the weights, and else of one.

    Args:
        config: with the settings of the search.
        streaming: of the model on its machine.
        is_weighed: whether rows are weighed, whose gradients begin with states that may be there
            at the same time.
    """
    if not streaming.is_streamed:
        return streaming.stages * _bytes_of_batch(config, streaming)
    search = streaming.stages * _batches(config, config.search_tokens)
    both = search * _bytes_of_batch(config, streaming)
    return both + (_states_of_rows(config, streaming) if is_weighed else 0)


def _of_statistics(config: PlanConfig, streaming: Streaming) -> tuple[Passes, Computed]:
    """Gradients that weigh the rows, and the sums, sequence by sequence; and what of it goes along
    with the calibration. Where memory holds the states between all blocks, both happen in one pass
    back over weights that are brought for it.
    """
    batches = _share(config, config.calibration_tokens)
    forwards, sums = Computed(forwards=batches), Computed(weighed=batches, summed=batches)
    own = _states_of_rows(config, streaming)
    if not streaming.is_streamed or own > streaming.state_bytes:
        sequences = math.ceil(config.calibration_tokens / config.longest)
        fitting = streaming.state_bytes * sequences // own if streaming.is_streamed else 1
        waves = math.ceil(sequences / max(1, fitting))
        return Passes(2 * waves + 1, computed=forwards + sums), NOTHING
    beside = _batches(config, config.calibration_tokens) * _bytes_of_batch(config, streaming)
    if _goes_ahead(config, streaming):
        search = streaming.stages * _batches(config, config.search_tokens)
        beside += search * _bytes_of_batch(config, streaming)
    if own + beside <= streaming.state_bytes:
        return Passes(1, computed=sums), forwards
    return Passes(2, computed=forwards + sums), NOTHING


def _states_of_rows(config: PlanConfig, streaming: Streaming) -> int:
    """Bytes of the states between all blocks of the calibration tokens."""
    tokens = math.ceil(config.calibration_tokens / config.longest) * config.longest
    return streaming.stages * tokens * streaming.width * _STATE_BYTES


def _noise(config: PlanConfig) -> int:
    """Batches that the BF16 model runs on once more for what two of its runs differ by."""
    return 1 if config.probe is ProbeMethod.SCREENED else 0


def _not_kept(config: PlanConfig, plan: Plan, tokens: int) -> float:
    """The part of a split's tokens whose logits of the BF16 model are computed for every candidate,
    as memory does not hold them.
    """
    logits = 4 * tokens * int(plan.source.text_config.get("vocab_size") or 0)
    return 1 - min(1.0, KEPT_LOGIT_BYTES / max(1, logits))


def _usual_recipes(plan: Plan) -> int:
    """Recipes that mean something for the model, those that come to the same once."""
    roles = {group.role for group in plan.groups}
    able = (recipe for recipe in recipes() if recipe.needs is None or recipe.needs in roles)
    return len({tuple(map(recipe.wish, plan.groups)) for recipe in able})


_Waves = Callable[[int, int], int]
"""Passes of so many batches, with so many forwards of each."""


def _batches(config: PlanConfig, tokens: int) -> int:
    """Batches of a split, as far as the text has sequences of full length."""
    return math.ceil(math.ceil(tokens / config.longest) / _sequences_of_batch(config))


def _share(config: PlanConfig, tokens: int) -> float:
    """The same in batches of full size."""
    return math.ceil(tokens / config.longest) / _sequences_of_batch(config)


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


def _of_probes(
    config: PlanConfig, plan: Plan, waves: _Waves, streaming: Streaming, choices: ChoicesOfGroups
) -> Passes:
    """Gradients forward, unless that went along with the calibration, and back; exact probes, as
    many together as fit, each from its own block on.
    """
    batches, share = _batches(config, config.search_tokens), _share(config, config.search_tokens)
    together = max(1, streaming.state_bytes // _bytes_of_batch(config, streaming))
    keys, anew = [*keys_of(plan.options.choices)], _not_kept(config, plan, config.search_tokens)
    behind = {group.name: _behind(group, streaming) for group in plan.groups}
    made = Computed(encoded=choices.plain, fitted=choices.fitted)
    if config.probe is ProbeMethod.EXACT:
        own = Computed(
            forwards=share * (1 + sum(behind[group] for group, _ in keys)),
            referred=share + anew * share * len(keys),
            probed=share * len(keys),
        )
        return Passes(math.ceil(len(keys) * batches / together), computed=made + own)
    ahead = _goes_ahead(config, streaming)
    gradients = 2 * waves(batches, streaming.stages) - ahead
    made += Computed(
        forwards=0.0 if ahead else share + _noise(config), backwards=share, referred=share
    )
    if config.probe is ProbeMethod.GRADIENT:
        return Passes(gradients, computed=made)
    groups, measured = {group for group, _ in keys}, len(measured_batches(batches))
    part = share * measured / batches
    exact = Computed(
        forwards=part * (1 + sum(behind[group] for group in groups)),
        referred=anew * part * len(groups),
        probed=part * len(groups),
        encoded=1.0 if streaming.is_streamed else 0.0,
    )
    passes = gradients + math.ceil(len(groups) * measured / together)
    return Passes(passes, computed=made + exact)


def _behind(group: LayerGroup, streaming: Streaming) -> float:
    """The part of the blocks that a probe of a group runs."""
    stages = max(1, streaming.stages)
    return 0.0 if group.layer is None else (stages - group.layer) / stages


def _goes_ahead(config: PlanConfig, streaming: Streaming) -> bool:
    """Whether what gradients need of the BF16 model goes along with the calibration."""
    if not streaming.is_streamed or config.probe is ProbeMethod.EXACT:
        return False
    search = _batches(config, config.search_tokens)
    forwards = streaming.stages * search + _batches(config, config.calibration_tokens)
    return forwards * _bytes_of_batch(config, streaming) <= streaming.state_bytes


def _of_trials(
    config: PlanConfig, plan: Plan, waves: _Waves, streaming: Streaming, choices: ChoicesOfGroups
) -> Mapping[str, Passes]:
    """What is given, together; then the optimum of what passed the check; then the refinement.
    Each is a pass where the states of all its forwards fit. Candidates of the refinement agree in
    most groups, so that a pass makes about one choice of each group anew.
    """
    batches, share = _batches(config, config.search_tokens), _share(config, config.search_tokens)
    pairs = max(1, streaming.state_bytes // _bytes_of_batch(config, streaming))
    ways = len(ways_among(plan.options.choices.values()))
    given = len(recipes()) + _OPTIMA + (ways if ways > 1 else 0)
    solved = sum(waves(batches, own) for own in _shares(given, pairs))
    most, usual = _of_refinement(config, waves, batches, pairs)
    again = choices.plain if streaming.is_streamed else 0.0
    part = _RUN_AMONG_OTHERS if streaming.is_streamed else _RUN_OF_TRIAL
    usually = _usual_recipes(plan) + _OPTIMA + max(0, ways - 1)
    anew = _not_kept(config, plan, config.search_tokens)
    return {
        "solve": Passes(
            solved + (ways > 1),
            is_most=True,
            computed=Computed(
                candidates=usually * share,
                referred=anew * usually * share,
                compared=usually * share,
                encoded=solved * again,
            ),
        ),
        "refine": Passes(
            most,
            is_most=True,
            usual=usual,
            computed=Computed(
                candidates=part * config.trials * share,
                referred=anew * config.trials * share,
                compared=config.trials * share,
                encoded=usual * min(1.0, again),
            ),
        ),
    }


def _of_refinement(config: PlanConfig, waves: _Waves, batches: int, pairs: int) -> tuple[int, int]:
    """Races by waves: the first batches of all that are known to come, then the other batches.

    The order of runners-up is known, and that of refits until they are fitted again; swaps are
    others after each that is better than the best before it.

    Args:
        config: says how many trials, and how many at a time.
        waves: of batches with so many forwards each.
        batches: of search tokens.
        pairs: forwards of a batch that go together.

    Returns:
        Passes at most, and of a refinement where one swap is better.
    """
    effort, width = Effort.of(config.trials), config.trials_at_once
    sequences = _sequences_of_batch(config)
    first = min(batches, max(math.ceil(FIRST_WAVE * batches), math.ceil(RACE_UNITS / sequences)))

    def passes(count: int, known: int) -> int:
        rounds = (
            own
            for part in _shares(count, known)
            for own in _shares(part, max(width, pairs // first))
        )
        return sum(waves(part, own) for own in rounds for part in (first, batches - first) if part)

    ranked = passes(effort.runners_up, effort.runners_up) + passes(effort.refit, REFIT_EVERY)
    half = max(width, math.ceil(effort.swaps / 2))
    return ranked + passes(effort.swaps, width), ranked + passes(effort.swaps, half)


def _shares(count: int, most: int) -> Iterator[int]:
    """A number in parts of `most`, the last of which may be smaller; none of nothing."""
    return (min(most, left) for left in range(count, 0, -max(1, most)))
