"""The tensors of a checkpoint that is not there, from its config.json alone.

transformers builds the model on the meta device, which holds shapes and no numbers, and gives the
names that it would save under.
"""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.errors import SourceError
from autoquant.source import names as table
from autoquant.source.declared import QUANTIZATION, find_declared
from autoquant.source.extent import LARGEST
from autoquant.source.headers import DTYPE_BYTES, Headers, TensorHeader
from autoquant.source.json_file import read_json_object
from autoquant.source.stored_forms import is_linear

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG_FILE = "config.json"
_FILE = "model.safetensors"
_TIES = "tie_word_embeddings"


def knows(model_type: object) -> bool:
    """Whether transformers has a model of this type; it is imported only where that is in doubt."""
    if not isinstance(model_type, str) or not model_type:
        return False
    package = importlib.util.find_spec("transformers")
    if package is not None and package.origin is not None and model_type.isidentifier():
        folder = Path(package.origin).parent / "models" / model_type
        if folder.is_dir():
            return True
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def ties_embeddings(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> bool:
    """Whether a config makes the output head the embeddings' matrix.

    One that does not say so means the default of its class; transformers is imported for that
    alone.

    Args:
        config: config.json.
        text_config: the language model's part of it.
    """
    said = config.get(_TIES, text_config.get(_TIES))
    if said is not None:
        return bool(said)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not knows(kind):
        return False
    from transformers import CONFIG_MAPPING

    return bool(getattr(CONFIG_MAPPING[kind], _TIES, False))


def has_own_head(
    config: Mapping[str, Any], text_config: Mapping[str, Any], headers: Headers
) -> bool:
    """Whether a head is stored beside other embeddings although the config ties them.

    transformers computes with the head then, and engines with the embeddings.

    Args:
        config: config.json.
        text_config: the language model's part of it.
        headers: of tensors that are there to be compared.
    """
    heads, embeddings = (
        [tensor for tensor in headers if pattern.fullmatch(_module(tensor.name))]
        for pattern in (table.HEAD, table.WORD_EMBEDDINGS)
    )
    if not (heads and embeddings and ties_embeddings(config, text_config)):
        return False
    from autoquant.source.tensors import are_equal

    return not any(are_equal(head, own) for head in heads for own in embeddings)


def _module(tensor: str) -> str:
    """The last name of the module that a weight belongs to."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says, as a whole and for its text part, that the head is a matrix apart."""
    nested = config.get("text_config")
    text = {"text_config": nested | {_TIES: False}} if isinstance(nested, dict) else {}
    return {**config, **text, _TIES: False}


def auto_class(config: Any) -> Any:
    """transformers' class that makes a language model of `config`, with images if it takes some."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind = type(config)
    only_images = kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    if only_images and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def architecture_headers(folder: Path) -> Headers:
    """Headers of the weights that `folder/config.json` describes, in BF16 or in block FP8.

    Tensors that transformers does not build (multi-token prediction heads) are not among them. The
    file that the headers name does not exist.

    Raises:
        SourceError: an architecture that transformers does not know, or cannot build from this
            config.
    """
    import torch

    config = read_json_object(folder / _CONFIG_FILE)
    if not knows(config.get("model_type")):
        raise SourceError(
            f"{folder} holds no weights, and transformers knows no model of the type "
            f"{config.get('model_type')!r} to derive their shapes from.",
            fix="download the weights' safetensors index and files too.",
        )
    LARGEST.require_layers(config)
    try:
        with torch.device("meta"), LARGEST.building():
            model = _build(folder)
        LARGEST.require_elements(model)
        stored = _stored(model)
    except SourceError:
        raise
    except Exception as error:  # model code raises anything on a config that it does not understand
        raise SourceError(
            f"{folder} holds no weights, and transformers cannot build the model that its "
            f"{_CONFIG_FILE} describes: {str(error).strip().partition(chr(10))[0]}",
            fix=f"check {_CONFIG_FILE}, or download the weights too.",
        ) from error
    return Headers.of([(folder / _FILE, _tensors(folder / _FILE, stored, config), {})])


def _build(folder: Path) -> Any:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, QUANTIZATION):
        del config.quantization_config
    return auto_class(config).from_config(config)


def _stored(model: Any) -> "dict[str, Tensor]":
    """Tensors without content by the names that transformers saves them under."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = model.all_tied_weights_keys
    weights = {name: value for name, value in model.state_dict().items() if name not in tied}
    saved: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return saved


def _tensors(
    file: Path, stored: "Mapping[str, Tensor]", config: Mapping[str, Any]
) -> Iterator[TensorHeader]:
    from autoquant.source.tensors import TORCH_DTYPES

    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    declared = find_declared(file.parent, config)
    block = declared.block if declared is not None and declared.is_read else None
    kept = declared.content.get("modules_to_not_convert") or () if declared is not None else ()
    position = 0
    for name, tensor in stored.items():
        shape = tuple(tensor.shape)
        dtype = names[tensor.dtype]
        parts = [(name, dtype, shape)]
        if block is not None and is_linear(name, shape) and not _is_kept(name, kept):
            scales = tuple(-(-n // size) for n, size in zip(shape, block, strict=True))
            parts = [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", scales)]
        for own, kind, sizes in parts:
            end = position + math.prod(sizes) * DTYPE_BYTES[kind]
            yield TensorHeader(
                name=own, dtype=kind, shape=sizes, file=file, begin=position, end=end
            )
            position = end


def _is_kept(name: str, modules: Iterable[str]) -> bool:
    """Whether `modules_to_not_convert` names the tensor's module, whole or by parts of its path."""
    return any(f".{module}." in f".{name}." for module in modules)
