"""The loaded, calibrated model of a configuration."""

from collections.abc import Iterable, Sequence

from autoquant.codes.cache import CodeCache
from autoquant.measure.calibration import Calibration, calibrate
from autoquant.measure.session import Session, open_session
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.linears import LayerGroup
from autoquant.progress import Progress
from autoquant.run.config.parts import LoadedConfig
from autoquant.source.source import Source


def open_measuring(
    config: LoadedConfig,
    source: Source,
    groups: Iterable[LayerGroup],
    attention: Sequence[str],
    observer: Progress,
    *,
    mode: ActivationMode = ActivationMode.W4A4,
    codes: CodeCache | None = None,
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
        trust_remote_code=config.trust_remote_code,
        codes=codes,
        observer=observer,
    )


def calibrate_session(session: Session, *, all_experts: bool, observer: Progress) -> Calibration:
    """The ranges that the calibration split shows."""
    split = session.splits["calibration"]
    observer.stage("calibrate", len(split.batches))
    return calibrate(session.scorer, split, observer.step, all_experts=all_experts)


def use_calibration(session: Session, calibration: Calibration, observer: Progress) -> None:
    """Let the session measure with these ranges; what they lack is a warning."""
    if (warning := calibration.warning()) is not None:
        observer.warn(warning)
    session.quantized.set_input_scales(calibration.scales())
    if session.quantized.kv_cache is not None:
        session.quantized.kv_cache.set_ranges(calibration.kv_ranges)
