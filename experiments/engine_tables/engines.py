"""The engines whose wheels are read, and how each of them names its model classes."""

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.engine_tables.sources import Class, Definition, Module, Wheel


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that serves exported checkpoints."""

    name: str
    package: str
    """Of its wheel."""
    architectures: Callable[[Wheel], dict[str, Class]]
    """Model classes by the names that config.json gives in `architectures`."""
    borrowed: Callable[[Wheel], Iterable[str]]
    """Architectures that it says to run with transformers' own code."""


def vllm_architectures(wheel: Wheel) -> dict[str, Class]:
    """Generating models of vLLM's registry."""
    package = "vllm.model_executor.models"
    registry = _module(wheel, f"{package}.registry")
    found: dict[str, Class] = {}
    for name in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"):
        for architecture, (origin, own) in ast.literal_eval(registry.symbols[name]).items():
            place = origin if origin.startswith("vllm.") else f"{package}.{origin}"
            found |= _class(wheel, _module(wheel, place), own, architecture)
    return found


def vllm_borrowed(wheel: Wheel) -> Iterable[str]:
    """What vLLM's registry gives to its classes around transformers' models."""
    registry = _module(wheel, "vllm.model_executor.models.registry")
    names: dict[str, object] = ast.literal_eval(registry.symbols["_TRANSFORMERS_SUPPORTED_MODELS"])
    return names


def sglang_architectures(wheel: Wheel) -> dict[str, Class]:
    """What SGLang's model files export as `EntryClass`, under the classes' own names."""
    found: dict[str, Class] = {}
    for name in wheel.names("sglang.srt.models"):
        module = _module(wheel, name)
        entry = module.symbols.get("EntryClass")
        entries = entry.elts if isinstance(entry, ast.List | ast.Tuple) else [entry]
        for own in entries:
            if isinstance(own, ast.Name):
                found |= _class(wheel, module, own.id, own.id)
    return found


def _module(wheel: Wheel, name: str) -> Module:
    found = wheel.module(name)
    if found is None:
        raise LookupError(f"{wheel.package} {wheel.version} has no module {name}")
    return found


def _class(wheel: Wheel, module: Module, name: str, architecture: str) -> dict[str, Class]:
    match wheel.resolve(module, name):
        case Definition(module=origin, node=ast.ClassDef() as node):
            return {architecture: wheel.class_of(origin, node)}
    raise LookupError(f"{wheel.package} {wheel.version}: {module.name} has no class {name}")


ENGINES = (
    Engine("vLLM", "vllm", vllm_architectures, vllm_borrowed),
    Engine("SGLang", "sglang", sglang_architectures, lambda _: ()),
)


def model_types(wheel: Wheel) -> dict[str, str]:
    """transformers' architecture of every `model_type`; language models before others."""
    auto = _module(wheel, "transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for name in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        call = auto.symbols[name]
        assert isinstance(call, ast.Call)
        pairs = ast.literal_eval(call.args[0])
        found = {kind: own for kind, own in pairs if isinstance(own, str)} | found
    return found
