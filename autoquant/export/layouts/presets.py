"""ModelOpt's quantization formats as choices, and the other way round."""

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from autoquant.environment import modelopt
from autoquant.errors import ConfigError
from autoquant.export.layouts.base import Layout
from autoquant.formats import NEAREST, Choice, Format, all_formats, choices_of


def presets() -> dict[str, Choice]:
    """Presets of ModelOpt that say the same as a choice."""
    return {
        name: Choice.parse(text)
        for format in all_formats()
        for name, text in _declared(format).get("presets", {}).items()
    }


def near_presets() -> dict[str, Format]:
    """Presets of a format whose codes are found otherwise than by any choice of ours."""
    return {name: f for f in all_formats() for name in _declared(f).get("near", ())}


def wished_choices(formats: Sequence[Mapping[str, Any] | str] | None) -> tuple[Choice, ...]:
    """The choices that ModelOpt's formats stand for.

    Args:
        formats: presets by name, or their configurations; None for every format with a preset, in
            every scale rule that looks at the weight alone.

    Raises:
        ConfigError: a format that AutoQuant has no choice for.
    """
    if formats is None:
        known = dict.fromkeys(choice.format for choice in presets().values())
        return tuple(choice for format in known for choice in _plain(format))
    found = [choice for format in formats if format is not None for choice in _choices(format)]
    return tuple(dict.fromkeys(found))


def preset_of(choice: Choice) -> str:
    """The preset of ModelOpt that says the same as a choice, or else of its format and input."""
    names = {choice: name for name, choice in presets().items()}
    return names.get(choice) or names[Choice.parse(choice.form)]


def name_of(config: Mapping[str, Any] | str) -> str | None:
    """The preset's name, or None for a configuration that is none."""
    if isinstance(config, str):
        return config
    mtq = modelopt("torch.quantization")
    for name in (*presets(), *near_presets()):
        if _same(getattr(mtq, name), config):
            return name
    return None


def _same(preset: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether both quantize weights and inputs alike by the same algorithm."""
    if preset.get("algorithm", "max") != config.get("algorithm", "max"):
        return False
    return all(_last(preset, what) == _last(config, what) for what in ("weight", "input"))


def _last(config: Mapping[str, Any], what: str) -> Any:
    """What the last entry for quantizers of this kind in general says; None where they are off."""
    quantizer = f"{what}_quantizer"
    entries = [
        entry
        for entry in config.get("quant_cfg", ())
        if isinstance(entry, Mapping)
        and entry.get("parent_class") is None
        and fnmatch(quantizer, entry.get("quantizer_name", ""))
    ]
    if not entries or not entries[-1].get("enable", True):
        return None
    attributes = dict(entries[-1].get("cfg") or {})
    attributes.pop("effective_bits", None)
    return attributes or None


def _choices(format: Mapping[str, Any] | str) -> tuple[Choice, ...]:
    name, known, near = name_of(format), presets(), near_presets()
    if name in known:
        return (known[name],)
    if name in near:
        warnings.warn(
            f"AutoQuant does not scale weights as {name} does: {near[name].label} is searched in "
            "each scale rule that looks at the weight alone.",
            stacklevel=4,
        )
        return _plain(near[name])
    raise ConfigError(
        f"AutoQuant has no format like {name or 'this configuration of ModelOpt'}.",
        fix=f"use {', '.join(known)}; for other formats mtq.auto_quantize itself.",
    )


def _plain(format: Format) -> tuple[Choice, ...]:
    """The choices of a format that rest on the weight alone and quantize its input."""
    return tuple(
        choice
        for choice in choices_of(format)
        if choice.rounding == NEAREST
        and not (choice.input or choice.is_cast or format.needs_moments(choice))
    )


def _declared(format: Format) -> Mapping[str, Any]:
    form = format.layouts.get(Layout.MODELOPT)
    return form.declared if form is not None else {}
