"""Which names of a checkpoint an engine loads into which of its modules.

Read from what its classes hold or mention: `packed_modules_mapping`, mappers of names, and the
lists of `load_weights`. Pairs of names are taken wherever they stand; whether a pair means a module
is decided by the modules that the engine builds.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from experiments.engine_tables.sources import Class, Definition, Module, Wheel

RENAMINGS = ("orig_to_new_substr", "orig_to_new_suffix", "orig_to_new_prefix")
LAYERS = ".layers."
"""Part of the names of packages whose classes are no models."""

DEPTH = 2
"""Constants and functions that a class mentions, and those that these mention."""


@dataclass
class Loading:
    """Names by which an engine loads a model."""

    stacked: dict[tuple[str, str, str], None] = field(default_factory=dict)
    """Part of a fused module's name, part of the checkpoint's name, and the shard it fills."""
    packed: dict[str, list[str]] = field(default_factory=dict)
    """Checkpoint names by the last name of the fused module."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Parts of names on disk, and what the engine calls them."""


def read_loading(wheel: Wheel, classes: Iterable[Class]) -> Loading:
    """What the classes of a model say of names."""
    found = Loading()
    for kind in dict.fromkeys(base for own in classes for base in own.order):
        if LAYERS not in kind.module.name:
            for node in _mentioned(wheel, kind.module, kind.node, DEPTH, frozenset()):
                _read(found, node)
    return found


def _mentioned(
    wheel: Wheel, module: Module, node: ast.AST, depth: int, seen: frozenset[ast.AST]
) -> Iterator[ast.AST]:
    """Nodes of a class, and of the constants and functions that it names."""
    for inner in ast.walk(node):
        yield inner
        named = _named(wheel, module, inner) if depth else None
        if named is not None and named.node not in seen and LAYERS not in named.module.name:
            yield from _mentioned(wheel, named.module, named.node, depth - 1, seen | {named.node})


def _named(wheel: Wheel, module: Module, node: ast.AST) -> Definition | None:
    """The constant or function that `node` names, in a module or in another class."""
    match node:
        case ast.Name(id=name):
            found = wheel.resolve(module, name)
            is_class = isinstance(found, Definition) and isinstance(found.node, ast.ClassDef)
            return found if isinstance(found, Definition) and not is_class else None
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            match wheel.resolve(module, name):
                case Definition(module=origin, node=ast.ClassDef() as kind):
                    own = wheel.class_of(origin, kind).find(attribute)
                    return Definition(own[0].module, own[1]) if own else None
    return None


def _read(found: Loading, node: ast.AST) -> None:
    match node:
        case ast.Tuple(elts=[ast.Constant(value=str() as ours), ast.Constant() as disk, shard]):
            if isinstance(disk.value, str):
                found.stacked[ours, disk.value, ast.unparse(shard)] = None
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                _read_pair(found, key, value)
        case ast.keyword(arg=name, value=ast.Dict() as pairs) if name in RENAMINGS:
            found.renamed |= _texts(pairs)
        case ast.Call(
            func=ast.Attribute(attr="replace"), args=[ast.Constant(), ast.Constant(), *_]
        ):
            disk, ours = (argument.value for argument in node.args[:2])
            if disk and isinstance(disk, str) and isinstance(ours, str):
                found.renamed[disk] = ours


def _read_pair(found: Loading, key: ast.expr | None, value: ast.expr) -> None:
    """`".q_proj": (".qkv_proj", "q")`, or `"qkv_proj": ["q_proj", "k_proj", "v_proj"]`."""
    match key, value:
        case ast.Constant(value=str() as ours), ast.List(elts=[ast.Constant(), *_] as parts):
            names = [part.value for part in parts if isinstance(part, ast.Constant)]
            found.packed.setdefault(ours, [name for name in names if isinstance(name, str)])
        case (
            ast.Constant(value=str() as disk),
            ast.Tuple(elts=[ast.Constant(value=str() as ours), shard]),
        ):
            found.stacked[ours, disk, ast.unparse(shard)] = None


def _texts(pairs: ast.Dict) -> dict[str, str]:
    return {
        key.value: value.value
        for key, value in zip(pairs.keys, pairs.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
        if isinstance(key.value, str) and isinstance(value.value, str)
    }
