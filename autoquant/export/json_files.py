"""The JSON files of a checkpoint, held against what is stored and against its source.

Servers take sizes, activations and quantization from these files. Each is made once more from the
tensors and the source, as an export would make it, and compared key by key.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from autoquant.errors import ConfigError, SourceError
from autoquant.export.companions import AUTOQUANT_FILE
from autoquant.export.declaration import Declaration, declare, exported_config
from autoquant.export.layouts.base import Layout
from autoquant.export.layouts.engine_view import EngineView, compressed_tensors_view, modelopt_views
from autoquant.export.layouts.modelopt import QUANTIZATION_FILE
from autoquant.export.read_back import QuantizedCheckpoint
from autoquant.formats import Choice
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.grouping import Groups, SharedExperts, group_tensors
from autoquant.plan.kv_cache import attention_modules
from autoquant.plan.linears import LayerGroup
from autoquant.source.contents import file_digests
from autoquant.source.json_file import read_json_object
from autoquant.source.shards import INDEX_FILE
from autoquant.source.source import CONFIG_FILE, Source, text_config

_QUANTIZATION = "quantization_config"
_SETS = ("ignore", "exclude_modules", "targets")
"""Keys of lists of modules, whose order says nothing."""
_WRITER = "producer.autoquant"
"""The version that wrote a checkpoint, which may be another than this one, or too old to say."""
_WITHOUT_JOINED_NAMES = (
    "an earlier version declared it, without the names that engines have for joined matrices: vLLM "
    "loads it, SGLang 0.5 refuses models such as Llama. Export it again for that."
)
_ABSENT = object()
_SHARED_EXPERTS: tuple[SharedExperts, ...] = ("with_routed", "separate")


def config_problems(checkpoint: QuantizedCheckpoint, source: Source) -> Iterator[str]:
    """Keys of config.json that are not the source's."""
    found = {key: value for key, value in checkpoint.config.items() if key != _QUANTIZATION}
    expected = exported_config(source.config, _declared(checkpoint))
    expected.pop(_QUANTIZATION, None)
    yield from _differences(CONFIG_FILE, found, expected, "the source has")


def declaration_problems(checkpoint: QuantizedCheckpoint, notes: list[str]) -> Iterator[str]:
    """Disagreement between what is stored and what the JSON files declare.

    Args:
        checkpoint: whose files.
        notes: gets what is no problem.
    """
    flat = checkpoint.config.get(_QUANTIZATION)
    file = checkpoint.path / QUANTIZATION_FILE
    declared = _declared(checkpoint)
    if declared is None:
        if flat is not None or file.exists():
            yield "nothing is quantized, and a quantization is declared."
        return
    is_modelopt = checkpoint.layout is Layout.MODELOPT
    if flat is None or file.exists() is not is_modelopt:
        yield (
            f"quantization_config and {QUANTIZATION_FILE} are both needed, and one is missing."
            if is_modelopt or flat is None
            else f"{QUANTIZATION_FILE} is not read beside {checkpoint.layout}, and it is there."
        )
        return
    try:
        nested = read_json_object(file) if is_modelopt else None
        yield from _read_by_engines(checkpoint, flat, nested)
    except SourceError as error:
        yield error.message
    except KeyError as error:
        yield f"a declaration of the quantization lacks what engines need: {error}."
    except TypeError as error:
        yield f"a declaration of the quantization is not what engines read: {error}."
    else:
        problems = [*_undeclared(declared, flat, nested)]
        earlier = _declared(checkpoint, with_joined_names=False) if problems else None
        if earlier is None or [*_undeclared(earlier, flat, nested)]:
            yield from problems
        else:
            notes.append(_WITHOUT_JOINED_NAMES)


def _read_by_engines(
    checkpoint: QuantizedCheckpoint, flat: Any, nested: dict[str, Any] | None
) -> Iterator[str]:
    """What engines would take otherwise than it is stored.

    Raises:
        KeyError: a key is missing that they need.
        TypeError: a value is of another type than they read.
    """
    view: EngineView
    if nested is None:
        view = compressed_tensors_view(flat)
    else:
        names = {own.name: own.engine_names for own in checkpoint.groups.linears}
        joined = {name: own for name, own in names.items() if own}
        view, other = modelopt_views(flat, nested, joined)
        if view != other:
            yield f"quantization_config and {QUANTIZATION_FILE} disagree."
    yield from _view_problems(checkpoint, view)


def _undeclared(declared: Declaration, flat: Any, nested: dict[str, Any] | None) -> Iterator[str]:
    """Keys of the declarations, such as sizes of blocks, that are not those of an export."""
    whose = "an export of what is stored has"
    yield from _differences(CONFIG_FILE, flat, declared.config, whose, _QUANTIZATION)
    for name, content in declared.files.items():
        yield from _differences(name, nested, content, whose)


def _view_problems(checkpoint: QuantizedCheckpoint, view: EngineView) -> Iterator[str]:
    for name in {*checkpoint.choices, *(linear.name for linear in checkpoint.groups.linears)}:
        stored, declared = checkpoint.choice(name).form, view.form(name)
        if stored != declared:
            yield f"{name} is stored in {stored}, and engines take it for {declared}."
    if checkpoint.attention:
        for module in set(attention_modules(checkpoint.groups)) - set(checkpoint.attention):
            yield f"{module} has no scales for its keys and values, and other modules have."
    if view.fp8_kv_cache is not bool(checkpoint.attention):
        declared_cache = KvCache.of(quantized=view.fp8_kv_cache).upper()
        yield (
            f"the cache of keys and values is declared in {declared_cache}, and scales are stored "
            f"for {len(checkpoint.attention)} attention modules."
        )


def provenance_problems(checkpoint: QuantizedCheckpoint) -> Iterator[str]:
    """autoquant.json and the index against what is stored, weight files bit for bit."""
    stored = checkpoint.headers.bytes
    if (checkpoint.path / INDEX_FILE).exists():
        metadata = read_json_object(checkpoint.path / INDEX_FILE).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != stored:
            yield f"{INDEX_FILE} says {total} bytes, and the tensors have {stored}."
    said = read_provenance(checkpoint)
    if said is None:
        return
    elements = checkpoint.source_headers.elements
    for key, value in (
        ("checkpoint_bytes", stored),
        ("source_elements", elements),
        ("bpe", 8 * stored / elements),
        ("layout", str(checkpoint.layout)),
        ("kv_cache", str(KvCache.of(quantized=bool(checkpoint.attention)))),
    ):
        is_free = key == "layout" and not checkpoint.choices
        if not _same(said.get(key), value) and not is_free:
            yield f"{AUTOQUANT_FILE} says {key} {said.get(key)}, and the tensors have {value}."
    yield from _assignment_problems(checkpoint, said.get("assignment"))
    yield from _digest_problems(checkpoint, said.get("sha256"))


def read_provenance(checkpoint: QuantizedCheckpoint) -> dict[str, Any] | None:
    """What autoquant.json says; None where there is none.

    Raises:
        SourceError: it is damaged.
    """
    file = checkpoint.path / AUTOQUANT_FILE
    return read_json_object(file) if file.exists() else None


def _assignment_problems(checkpoint: QuantizedCheckpoint, assignment: Any) -> Iterator[str]:
    """Groups whose choice is not the stored one."""
    if not isinstance(assignment, dict):
        yield f"{AUTOQUANT_FILE} has no mapping `assignment`."
        return
    groups = _groups_of(checkpoint, assignment)
    left = {linear.name for linear in checkpoint.groups.linears}
    for name, choice in assignment.items():
        group = groups.get(name)
        if group is None:
            yield f"{AUTOQUANT_FILE} names the group {name}, which the tensors do not make."
            continue
        form = _form(choice)
        for linear in group.linears:
            left.discard(linear.name)
            stored = checkpoint.choice(linear.name).form
            if stored != form:
                yield f"{AUTOQUANT_FILE} says {name} {choice}, and {linear.name} is {stored}."
    for linear_name in sorted(left):
        yield f"{AUTOQUANT_FILE} says nothing of {linear_name}."


def _groups_of(checkpoint: QuantizedCheckpoint, named: Collection[str]) -> Mapping[str, LayerGroup]:
    """The layer groups with these names: shared experts may have been groups of their own."""
    found = [
        group_tensors(
            checkpoint.source_headers.tensors,
            checkpoint.config,
            text_config(checkpoint.config),
            shared_experts=shared_experts,
        ).by_name
        for shared_experts in _SHARED_EXPERTS
    ]
    return min(found, key=lambda groups: len(groups.keys() ^ set(named)))


def _form(choice: Any) -> str | None:
    try:
        return Choice.parse(str(choice)).form
    except ConfigError:
        return None


def _digest_problems(checkpoint: QuantizedCheckpoint, said: Any) -> Iterator[str]:
    """Weight files that are not, bit for bit, those that were exported."""
    if said is None:  # not written by earlier versions
        return
    if not isinstance(said, dict):
        yield f"{AUTOQUANT_FILE} has a `sha256` that is not a mapping of files to digests."
        return
    for name, digest in file_digests(checkpoint.headers.files).items():
        if said.get(name) != digest:
            yield f"{name} has changed since it was exported: its SHA-256 is {digest[:16]}..."


def _declared(
    checkpoint: QuantizedCheckpoint, *, with_joined_names: bool = True
) -> Declaration | None:
    """What an export of the stored tensors declares; None where nothing is quantized."""
    if not checkpoint.choices:
        return None
    groups = checkpoint.groups
    return declare(
        checkpoint.layout,
        checkpoint.source_headers,
        groups if with_joined_names else _without_joined_names(groups),
        checkpoint.choices,
        KvCache.of(quantized=bool(checkpoint.attention)),
    )


def _without_joined_names(groups: Groups) -> Groups:
    return replace(
        groups,
        groups=tuple(
            replace(group, linears=tuple(replace(own, engine_names=()) for own in group.linears))
            for group in groups.groups
        ),
    )


def _differences(
    file: str, found: Any, expected: Any, whose: str, place: str = ""
) -> Iterator[str]:
    """A sentence for each key whose value is not the expected one.

    Args:
        file: whose keys.
        found: in the file.
        expected: in its place.
        whose: who expects it, as `the source has`.
        place: keys down to `found`, joined by points.
    """
    if place.endswith(_WRITER):
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in dict.fromkeys((*expected, *found)):
            below = found.get(key, _ABSENT), expected.get(key, _ABSENT)
            yield from _differences(file, *below, whose, f"{place}.{key}" if place else key)
    elif place.rpartition(".")[2] in _SETS and _are_names(found) and _are_names(expected):
        for name in sorted(set(expected) - set(found)):
            yield f"{file} has no {name} in {place}, and {whose} it."
        for name in sorted(set(found) - set(expected)):
            yield f"{file} has {name} in {place}, and {whose} no such."
    elif not _same(found, expected):
        has = f"no {place}" if found is _ABSENT else f"{place} {_text(found)}"
        yield f"{file} has {has}, and {whose} {'none' if expected is _ABSENT else _text(expected)}."


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; 1 and 1.0 are, NaN is to itself, and true is not 1."""
    if one is _ABSENT or other is _ABSENT:
        return False
    if isinstance(one, (list, dict)) or isinstance(other, (list, dict)):
        return _text(one) == _text(other)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    is_nan = [isinstance(value, float) and math.isnan(value) for value in (one, other)]
    return all(is_nan) or bool(one == other)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=isinstance(value, Mapping))
