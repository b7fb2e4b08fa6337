"""How engines name modules, and which modules a declaration of the quantization lists."""

import re
from collections.abc import Mapping

from autoquant.formats import Choice
from autoquant.plan.grouping import Groups
from autoquant.source import names as table
from autoquant.source.headers import Headers

_HEAD = "lm_head"
_FFN_EXPERTS = re.compile(r"^(?:model\.)?(layers\.\d+)\.ffn\.(?=experts\b)")
"""DeepSeek-V4's on disk and in vLLM; SGLang holds them under `mlp`."""
_DISK_BLOCK, _ENGINE_BLOCK = "block_sparse_moe", "mlp"
"""transformers and engines hold under `mlp` what these checkpoints store as `block_sparse_moe`."""


def unquantized_modules(
    headers: Headers, groups: Groups, choices: Mapping[str, Choice]
) -> list[str]:
    """Every module that holds a matrix and stays as it is, and the containers of its experts.

    Joined matrices are there under the engines' names too: SGLang 0.5 has models that do not say
    what they join, such as Llama.

    Args:
        headers: the source's tensors.
        groups: its layer groups.
        choices: of every quantized linear by name.
    """
    left = [linear for linear in groups.linears if linear.name not in choices]
    modules = [linear.name for linear in left]
    disputed = disputed_names(groups, choices)
    names = dict.fromkeys(name for linear in left for name in linear.engine_names)
    modules += (name for name in names if name not in disputed)
    matrices = (tensor.name for tensor in groups.fixed if len(headers[tensor.name].shape) >= 2)
    modules += (name.removesuffix(".weight") for name in matrices)
    if not any(map(is_head, choices)):
        modules.append(_HEAD)
    quantized = set(map(experts_container, choices))
    named: dict[str, None] = {}
    for module in modules:
        container = experts_container(module)
        named |= dict.fromkeys(spellings(module) if container is None else (module,))
        if container is not None and container not in quantized:
            named |= dict.fromkeys(spellings(container))
    return list(named)


def disputed_names(groups: Groups, choices: Mapping[str, Choice]) -> frozenset[str]:
    """Engines' names for linears of different forms, of which no declaration can say both."""
    forms: dict[str, set[str | None]] = {}
    for linear in groups.linears:
        choice = choices.get(linear.name)
        for name in linear.engine_names:
            forms.setdefault(name, set()).add(choice.form if choice else None)
    return frozenset(name for name, own in forms.items() if len(own) > 1)


def experts_container(name: str) -> str | None:
    """`...mlp.experts` of an expert's linear, or of experts stored as one tensor."""
    match = table.ROUTED_EXPERT.fullmatch(name)
    if match:
        return match["container"]
    return name.rpartition(".")[0] if table.FUSED_EXPERTS.fullmatch(name) else None


def is_head(name: str) -> bool:
    """Whether the linear is an output head, of a model or of the text part of one."""
    return name.rpartition(".")[2] == _HEAD


def spellings(name: str) -> tuple[str, ...]:
    """The name on disk, and the engines' own where it differs."""
    other = name.replace(f".{_DISK_BLOCK}.", f".{_ENGINE_BLOCK}.")
    of_deepseek_v4 = _FFN_EXPERTS.sub(r"model.\1.mlp.", name)
    return tuple(dict.fromkeys((name, other, of_deepseek_v4)))


def layer_of(name: str) -> str:
    """`model.layers.3`, or nothing for a module outside of the layers."""
    match = table.LAYER.fullmatch(name)
    return match["layer"] if match else ""
