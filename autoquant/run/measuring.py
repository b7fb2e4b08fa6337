"""The loaded, calibrated model of a configuration."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import MOST_CODES_BYTES, CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.statistics_size import groups_with_moments, require_disk
from autoquant.codes.weights import FileWeights
from autoquant.measure.calibration import Calibration, calibrate
from autoquant.measure.compare import Ahead
from autoquant.measure.racing.local import LocalEvaluator, fitting
from autoquant.measure.ranks.ranks import ALONE, Ranks
from autoquant.measure.session import Session, open_session
from autoquant.measure.statistics.chunks import why_unfitted
from autoquant.measure.statistics.moments import keep_moments, steps_of
from autoquant.measure.statistics.observed import use_scales
from autoquant.measure.statistics.weighing import input_sets
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.linears import LayerGroup
from autoquant.plan.plan import Plan
from autoquant.progress import Progress
from autoquant.run.config.parts import LoadedConfig, TextConfig
from autoquant.source.source import Source
from autoquant.store.run_directory import CODES, RESULT, STATISTICS, home_of, read_json


def open_measuring(
    config: TextConfig,
    source: Source,
    groups: Iterable[LayerGroup],
    attention: Sequence[str],
    observer: Progress,
    *,
    mode: ActivationMode = ActivationMode.W4A4,
    codes: CodeCache | None = None,
    statistics: StatisticsStore | None = None,
    ranks: Ranks = ALONE,
    work: int | None = None,
) -> Session:
    """The loaded model with its tokens.

    Args:
        config: text, tokens, device.
        source: what to load.
        groups: the groups that may leave BF16.
        attention: attention modules whose keys and values are cached in FP8.
        observer: told of progress and shortfalls.
        mode: which inputs are quantized; calibration quantizes none.
        codes: where codes are kept that cost more to make than to read.
        statistics: where moments of the inputs are kept, for codes that rest on them; a folder of
            the session's own by default.
        ranks: the processes that batches are dealt to.
        work: bytes that go beside weights and codes on a CPU, where that is known.

    Raises:
        SourceError: text or model missing, damaged or not understood.
        OutOfMemory: the model does not fit the device.
    """
    return open_session(
        source,
        groups,
        attention=attention,
        calibration=config.text,
        tokens=config.tokens,
        mode=mode,
        device=config.device,
        allowance=replace(config.allowance, work_bytes=work),
        trust_remote_code=config.trust_remote_code,
        codes=codes,
        statistics=statistics or StatisticsStore.temporary(),
        ranks=ranks,
        observer=observer,
    )


def code_cache(source: Source, run: Path) -> CodeCache:
    """Where a run directory keeps codes."""
    folder = home_of(run) / CODES
    return CodeCache(folder, made_from=source.digest, most_bytes=MOST_CODES_BYTES)


def statistics_store(run: Path) -> StatisticsStore:
    """Where a run directory keeps statistics."""
    return StatisticsStore(home_of(run) / STATISTICS)


def book_of_run(source: Source, run: Path) -> CodeBook:
    """The codes that a run directory keeps; others from the source's files and its statistics."""
    book = CodeBook(
        FileWeights(source.headers),
        memory_bytes=0,
        cache=code_cache(source, run),
        statistics=statistics_store(run),
    )
    polish = (read_json(run, RESULT) or {}).get("polish")
    if polish:
        book.use_polish(polish["key"])
    return book


def calibrate_session(
    config: LoadedConfig, session: Session, observer: Progress, ahead: Ahead | None = None
) -> Calibration:
    """The ranges that the calibration split shows, and their headroom.

    Args:
        config: says what input scales are to hold.
        session: all groups in BF16.
        observer: told of progress.
        ahead: what else the BF16 model runs on in the pass.
    """
    split = session.splits["calibration"]
    observer.stage("calibrate", len(split.batches))
    return calibrate(
        session.scorer,
        split,
        observer.step,
        all_experts=config.calibrate_all_experts,
        headroom=config.input_headroom,
        ahead=ahead,
    )


def collect_statistics(
    session: Session, groups: Collection[LayerGroup], observer: Progress
) -> None:
    """Keep the moments of the inputs of groups whose codes rest on them, unless they are kept.

    Args:
        session: calibrated, with a place for statistics.
        groups: as `groups_with_moments` finds them.
        observer: told of progress.

    Raises:
        SourceError: the disk has no room for them.
    """
    if groups:
        assert session.statistics is not None
        require_disk(session.statistics.folder, groups)
        split = session.splits["calibration"]
        if (why := why_unfitted(split)) is not None:
            observer.warn(f"no codes are fitted to inputs: {why}; more --calibration-tokens help.")
        observer.stage("statistics", steps_of(session.scorer, split))
        keep_moments(session.scorer, split, groups, advance=observer.step)
        warn_of_row_weights(session.statistics, groups, observer)


def warn_of_row_weights(
    statistics: StatisticsStore, groups: Iterable[LayerGroup], observer: Progress
) -> None:
    """Say which inputs of groups take all tokens as equally important, though they were weighed."""
    inside = input_sets(own for own in groups if own.layer is not None)
    if unreached := statistics.unreached(inside):
        observer.warn(
            f"gradients say nothing of {len(unreached)} of {len(inside)} inputs, such as "
            f"{unreached[0]}: codes that are fitted to these take all tokens as equally important."
        )
    if (why := statistics.why_alike()) is not None:
        observer.warn(
            f"the model has no backward pass ({why}), so codes that are fitted to inputs take all "
            "tokens as equally important."
        )


def use_calibration(session: Session, calibration: Calibration, observer: Progress) -> None:
    """Let the session measure with these ranges; what they lack is a warning."""
    if (warning := calibration.warning()) is not None:
        observer.warn(warning)
    use_scales(session.scorer, calibration.scales(), calibration.kv_ranges)


def make_ready(
    session: Session, plan: Plan, calibration: Mapping[str, Any], observer: Progress
) -> None:
    """Let a session measure with the input ranges of a search, and have what codes rest on."""
    use_calibration(session, Calibration.from_dict(dict(calibration)), observer)
    resting = groups_with_moments(plan.options.choices, session.quantized.groups)
    collect_statistics(session, resting, observer)


def local_evaluator(session: Session, together: int) -> LocalEvaluator:
    """Measures on the search tokens in this process; where the weights are brought for every pass,
    all that is asked for at once, as far as memory holds it.

    Args:
        session: calibrated.
        together: requests that go through the blocks together at least.
    """
    scorer, split = session.scorer, session.splits["search"]
    each = fitting(scorer, split)
    return LocalEvaluator(
        scorer,
        split,
        max(together, each),
        pairs=scorer.ranks.size * each,
        waited=lambda: session.quantized.brought.waited,
    )
