"""Which linears share a matrix in a serving engine, what it calls them, and which stay unquantized.

The engines' own tables decide wherever they know a linear; the table of names is for the rest.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoquant.source import names as table
from autoquant.source.engines.tables import EngineTable

_QWEN3_VL = ((re.compile(r"self_attn\.qkv_proj"), "{layer}.self_attn.qkv"),)
LOOKED_UP = {
    "mixtral": ((re.compile(r"self_attn\.(?P<part>\w+)"), "layers.{index}.self_attn.{part}"),),
    "qwen3_vl_text": _QWEN3_VL,
    "qwen3_vl_moe_text": _QWEN3_VL,
    "gemma2": ((re.compile(r"(?P<part>(self_attn|mlp)\.\w+)"), "{part}"),),
    "kimi_linear": ((re.compile(r"\w+\.shared_experts\.(?P<part>\w+)"), "{part}"),),
    "deepseek_v4": (
        (re.compile(r"attn\.fused_wqa_wkv"), "model.layers.{index}.self_attn.wqkv_a"),
        (
            re.compile(r"attn\.(?P<part>.*compressor)\.fused_wkv_wgate"),
            "model.layers.{index}.self_attn.{part}.wkv_gate",
        ),
        (re.compile(r"attn\.(?P<part>.+)"), "model.layers.{index}.self_attn.{part}"),
        (re.compile(r"ffn\.(?P<part>.+_proj)"), "model.layers.{index}.mlp.{part}"),
        (
            re.compile(r"ffn\.shared_experts\.w2"),
            "model.layers.{index}.mlp.shared_experts.down_proj",
        ),
    ),
    "falcon_h1": (
        (re.compile(r"self_attn\.(?P<part>\w+)"), "{layer}.{part}"),
        (re.compile(r"feed_forward\.(?P<part>\w+)"), "{layer}.mlp.{part}"),
        (re.compile(r"mamba\.(?P<part>\w+)"), "{root}.{behind}.mixer.{part}"),
    ),
    "zamba2": (
        (re.compile(r"shared_transformer\.(self_attn\.)?(?P<part>.+)"), "{root}.{part}"),
        (re.compile(r"(mamba_decoder\.)?mamba\.(?P<part>\w+)"), "{behind}.mixer.{part}"),
        (re.compile(r"linear"), "{behind}.linear"),
    ),
}
"""By model type: modules of a block whose quantization vLLM 0.33 (Falcon-H1, Zamba2) or SGLang
0.5.23 looks up under another name than their own, and that name. `root` is what holds the layers;
`behind` is the block's index if its state-space branch stood behind all others. SGLang tells
Gemma 2 no layer at all, and Kimi-Linear none of shared experts."""

LOOKED_UP_EVERYWHERE = (
    (
        re.compile(r"self_attn\.fused_qkv_a_proj"),
        "{layer}.self_attn.fused_qkv_a_proj_with_mqa",
    ),
)
"""The same of every model: vLLM's name of DeepSeek's first projections, and SGLang's."""


ONE_FORMAT = frozenset({"zamba2"})
"""Model types whose modules of one looked-up name need one format: no engine tells them apart. Of
the others, vLLM does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What engines multiply as one matrix, of one linear or of several."""

    name: str
    """Inside of the block: `self_attn.qkv`."""
    parts: tuple[str, ...] = field(repr=False)
    """Its linears by their names inside of the block."""
    role: str
    engine_names: tuple[str, ...] = field(default=(), repr=False)
    """What engines call it, where that is not the name of its one linear."""
    is_known: bool = False
    """Whether an engine's table knows its linears."""
    closed: str = ""
    """Why it stays in BF16 under every space."""
    caution: str = ""
    """The engine that does not load it quantized, although another one does."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """Linears that something joins."""

    name: str
    """Ours."""
    engine_names: tuple[str, ...]
    parts: tuple[str, ...]

    @classmethod
    def with_all(cls, overlapping: Iterable["_Joined"], last: "_Joined") -> "_Joined":
        """One for all of them, by the first one's name."""
        joined = [*overlapping, last]
        return cls(
            joined[0].name,
            tuple(dict.fromkeys(name for own in joined for name in own.engine_names)),
            tuple(dict.fromkeys(part for own in joined for part in own.parts)),
        )


def matrices(block: Collection[str], engines: tuple[EngineTable, ...]) -> dict[str, Matrix]:
    """The matrix of every linear of a block, by the linear's name.

    Args:
        block: names such as `self_attn.q_proj`, and containers such as `mlp.experts`.
        engines: tables of the engines that know the architecture; where they disagree on what can
            be quantized, the first that knows the linear decides.
    """
    fused: list[_Joined] = []
    for joined in (*_by_engines(block, engines), *_by_names(block, engines)):
        overlapping = [own for own in fused if not {*own.parts}.isdisjoint(joined.parts)]
        fused = [own for own in fused if own not in overlapping]
        fused.append(_Joined.with_all(overlapping, joined))
    members = {part for own in fused for part in own.parts}
    alone = [
        _Joined(name, tuple(_renamed(name, engines)), (name,))
        for name in block
        if name not in members
    ]
    refusing = [(engine, engine.unquantized_in(block)) for engine in engines]
    made = [_matrix(own, refusing) for own in (*fused, *alone)]
    return {part: matrix for matrix in made for part in matrix.parts}


def _by_engines(block: Collection[str], engines: tuple[EngineTable, ...]) -> Iterator[_Joined]:
    """What engines join, under our name where the table of names has one."""
    for engine in engines:
        for joined in engine.joined_in(block):
            last = joined.path.rpartition(".")[2]
            parts = {part.rpartition(".")[2] for part in joined.parts}
            rows = (row for row in table.FUSED if row.engine_name == last)
            name = next((row.name for row in rows if parts <= {*row.parts}), last)
            first = joined.parts[0]
            yield _Joined(_beside(first, name), (_beside(first, last),), joined.parts)


def _by_names(block: Collection[str], engines: tuple[EngineTable, ...]) -> Iterator[_Joined]:
    """What the table of names joins, of linears that no engine knows."""
    by_parent: dict[str, list[str]] = {}
    for name in block:
        if all(engine.module(name) is None for engine in engines):
            by_parent.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_parent.values():
        for row in table.FUSED:
            parts = tuple(name for name in names if name.rpartition(".")[2] in row.parts)
            if len(parts) > 1:
                engine_name = _beside(parts[0], row.engine_name)
                yield _Joined(_beside(parts[0], row.name), (engine_name,), parts)


def _renamed(name: str, engines: Iterable[EngineTable]) -> Iterator[str]:
    """Names that engines hold a linear under, where they are not its own."""
    for module in dict.fromkeys(engine.module(name) for engine in engines):
        if module is not None and module != name and "*" not in module:
            yield module


def _beside(linear: str, name: str) -> str:
    """A name in the module that holds the linear."""
    parent, dot, _ = linear.rpartition(".")
    return f"{parent}{dot}{name}"


def _matrix(joined: _Joined, refusing: list[tuple[EngineTable, frozenset[str]]]) -> Matrix:
    """Args: refusing: what each engine holds unquantized."""
    parts = joined.parts
    lasts = [part.rpartition(".")[2] for part in parts]
    role = next(filter(None, map(_role, lasts)), "")
    if all(map(table.INSIDE_INDEXER.fullmatch, parts)):
        role = table.INDEXER_ROLE
    knowing = [e.engine for e, _ in refusing if any(e.module(part) for part in parts)]
    no = [engine.engine for engine, names in refusing if not names.isdisjoint(parts)]
    closed = next((table.CLOSED[last] for last in lasts if last in table.CLOSED), "")
    if no and no[0] == knowing[0]:
        closed = closed or f"{no[0]} builds it without a quantization"
    is_known = refusing and refusing[0][0].engine in knowing
    return Matrix(
        name=joined.name,
        parts=parts,
        engine_names=joined.engine_names,
        is_known=bool(knowing),
        role=role or ("other" if is_known else table.UNKNOWN_ROLE),
        closed=closed,
        caution="" if closed else ", ".join(no),
    )


def _role(last: str) -> str:
    row = next((row for row in table.FUSED if last in row.parts), None)
    return row.role if row else table.SINGLE.get(last, "")


def looked_up(module: str, text_config: Mapping[str, Any]) -> Iterator[str]:
    """The name under which an engine looks up a module's quantization, where it is another one.

    Modules of several layers may share it.

    Args:
        module: `model.layers.3.mamba.in_proj`.
        text_config: of the language model.
    """
    block = table.LAYER.fullmatch(module)
    own = LOOKED_UP.get(text_config.get("model_type", ""), ())
    for pattern, name in (*own, *LOOKED_UP_EVERYWHERE):
        found = block and pattern.fullmatch(block["rest"])
        if block and found:
            root = block["layer"].rpartition(".layers.")[0]
            behind = _number_of_blocks(text_config) + int(block["index"])
            yield name.format(**block.groupdict(), **found.groupdict(), root=root, behind=behind)


def _number_of_blocks(text_config: Mapping[str, Any]) -> int:
    """Of an architecture whose shared blocks an engine counts behind all others."""
    shared_at, count = text_config.get("hybrid_layer_ids"), text_config.get("num_hidden_layers")
    if isinstance(shared_at, list):
        return len(shared_at)
    return count if isinstance(count, int) else 0
