"""Which linears share a matrix in a serving engine, and which an engine keeps unquantized.

The engines' own tables decide wherever they know a linear; the table of names is for the rest.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from autoquant.source import names as table
from autoquant.source.engines import EngineTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What engines multiply as one matrix, of one linear or of several."""

    name: str
    """Inside of the block: `self_attn.qkv`."""
    parts: tuple[str, ...] = field(repr=False)
    """Its linears by their names inside of the block."""
    role: str
    closed: str = ""
    """Why it stays in BF16 under every space."""
    caution: str = ""
    """The engine that does not load it quantized, although another one does."""


def matrices(block: Collection[str], engines: tuple[EngineTable, ...]) -> dict[str, Matrix]:
    """The matrix of every linear of a block, by the linear's name.

    Args:
        block: names such as `self_attn.q_proj`, and containers such as `mlp.experts`.
        engines: tables of the engines that know the architecture; where they disagree on what can
            be quantized, the first that knows the linear decides.
    """
    fused: list[tuple[str, dict[str, None]]] = []
    for name, parts in (*_by_engines(block, engines), *_by_names(block, engines)):
        overlapping = [own for own in fused if not own[1].keys().isdisjoint(parts)]
        fused = [own for own in fused if own not in overlapping]
        together = {part: None for own in overlapping for part in own[1]} | dict.fromkeys(parts)
        fused.append((overlapping[0][0] if overlapping else name, together))
    members = {part for _, parts in fused for part in parts}
    alone = [(name, {name: None}) for name in block if name not in members]
    refusing = [(engine, engine.unquantized_in(block)) for engine in engines]
    made = [_matrix(name, tuple(parts), refusing) for name, parts in (*fused, *alone)]
    return {part: matrix for matrix in made for part in matrix.parts}


def _by_engines(
    block: Collection[str], engines: tuple[EngineTable, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What engines join, under our name where the table of names has one."""
    for engine in engines:
        for joined in engine.joined_in(block):
            last = joined.path.rpartition(".")[2]
            parts = {part.rpartition(".")[2] for part in joined.parts}
            rows = (row for row in table.FUSED if row.engine_name == last)
            name = next((row.name for row in rows if parts <= {*row.parts}), last)
            yield _beside(joined.parts[0], name), joined.parts


def _by_names(
    block: Collection[str], engines: tuple[EngineTable, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the table of names joins, of linears that no engine knows."""
    by_parent: dict[str, list[str]] = {}
    for name in block:
        if all(engine.module(name) is None for engine in engines):
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_parent.values():
        for row in table.FUSED:
            parts = tuple(name for name in names if name.rpartition(".")[2] in row.parts)
            if len(parts) > 1:
                yield _beside(parts[0], row.name), parts


def _beside(linear: str, name: str) -> str:
    """A name in the module that holds the linear."""
    parent, dot, _ = linear.rpartition(".")
    return f"{parent}{dot}{name}"


def _matrix(
    name: str, parts: tuple[str, ...], refusing: list[tuple[EngineTable, frozenset[str]]]
) -> Matrix:
    """Args: refusing: what each engine holds unquantized."""
    lasts = [part.rpartition(".")[2] for part in parts]
    role = next(filter(None, map(_role, lasts)), "")
    knowing = [e.engine for e, _ in refusing if any(e.module(part) for part in parts)]
    no = [engine.engine for engine, names in refusing if not names.isdisjoint(parts)]
    closed = next((table.CLOSED[last] for last in lasts if last in table.CLOSED), "")
    if no and no[0] == knowing[0]:
        closed = closed or f"{no[0]} builds it without a quantization"
    is_known = refusing and refusing[0][0].engine in knowing
    return Matrix(
        name=name,
        parts=parts,
        role=role or ("other" if is_known else table.UNKNOWN_ROLE),
        closed=closed,
        caution="" if closed else ", ".join(no),
    )


def _role(last: str) -> str:
    row = next((row for row in table.FUSED if last in row.parts), None)
    return row.role if row else table.SINGLE.get(last, "")
