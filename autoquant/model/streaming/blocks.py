"""The blocks of a model's decoder: which tensors each is made of, and how they are read.

A model is built without the content of its blocks. A block is read from the checkpoint's files when
it is needed, by the rules that transformers loads a whole model with: renamed, joined, stacked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.errors import SourceError
from autoquant.model.binding import Names
from autoquant.source.headers import TensorHeader, stored_bytes
from autoquant.source.tensors import read_tensor


def decoder_blocks(model: Any) -> list[Any]:
    """The blocks of the text decoder: the list whose length the configuration names."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count > 0:
            return list(module)
    return []


class Unread:
    """A tensor that is read when transformers asks for its content, as a safetensors slice is."""

    def __init__(self, header: TensorHeader) -> None:
        self._header = header

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self._header)[index]


class Absent:
    """A tensor that stays out of memory: transformers gets its shape alone."""

    def __init__(self, header: TensorHeader) -> None:
        self._shape = header.shape

    def __getitem__(self, index: Any) -> "Absent":
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as transformers places it, on the meta device whatever it asks for."""
        return torch.empty(self._shape, dtype=dtype, device="meta")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model keeps one tensor."""

    module: nn.Module
    name: str
    """Of the module's parameter or buffer."""
    full_name: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Let the module have this tensor."""
        if self.name in self.module._parameters:
            self.module._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.module._buffers[self.name] = tensor


def places_of(model: nn.Module, block: nn.Module) -> tuple[Place, ...]:
    """Where a model keeps the stored tensors of one of its modules, which no other block has."""
    (prefix,) = [name for name, module in model.named_modules() if module is block]
    places = (
        Place(block.get_submodule(owner), name, f"{prefix}.{full}")
        for full in block.state_dict()
        for owner, _, name in [full.rpartition(".")]
    )
    shared = _shared(model)
    return tuple(place for place in places if id(place.tensor) not in shared)


def _shared(model: Any) -> set[int]:
    """Identities of parameters that several blocks hold (Zamba2); a checkpoint stores them once.

    They stay in memory like what is outside of all blocks.
    """
    holders: dict[int, set[int]] = {}
    for index, block in enumerate(decoder_blocks(model)):
        for parameter in block.parameters():
            holders.setdefault(id(parameter), set()).add(index)
    return {own for own, blocks in holders.items() if len(blocks) > 1}


def by_block(
    model: Any, headers: Iterable[TensorHeader]
) -> tuple[list[TensorHeader], list[list[TensorHeader]]]:
    """The tensors of a checkpoint outside of all blocks or in several, and those of each block.

    Args:
        model: of that architecture, with or without weights.
        headers: of the checkpoint.
    """
    names, blocks = Names(model), decoder_blocks(model)
    number = {id(block): index for index, block in enumerate(blocks)}
    prefixes = {
        f"{name}.": number[id(module)]
        for name, module in model.named_modules()
        if id(module) in number
    }
    outside: list[TensorHeader] = []
    inside: list[list[TensorHeader]] = [[] for _ in blocks]
    depth = {prefix.count(".") for prefix in prefixes}
    shared = _shared(model)
    common = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in shared
    }
    for header in headers:
        place = names.locate(header.name)[0]
        if place in common:
            outside.append(header)
            continue
        parts = place.split(".")
        heads = (".".join(parts[:count]) + "." for count in depth)
        index = next((prefixes[head] for head in heads if head in prefixes), None)
        (outside if index is None else inside[index]).append(header)
    return outside, inside


class BlockReader:
    """Reads the content of blocks; not from two threads at once.

    Args:
        shape: a second model of the architecture, without weights; blocks are put together in it.
        headers: of the stored tensors of each block.
    """

    def __init__(self, shape: Any, headers: list[list[TensorHeader]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self._shape = shape
        self._headers = headers
        self._places = [places_of(shape, block) for block in decoder_blocks(shape)]
        rules: Any = get_model_conversion_mapping(shape)
        self._rules = LoadStateDictConfig(
            dtype=torch.bfloat16,
            dtype_plan=shape._get_dtype_plan(torch.bfloat16),
            weight_mapping=rules,
        )

    def __len__(self) -> int:
        return len(self._headers)

    def bytes(self, block: int) -> int:
        """Memory of a block."""
        tensors = (place.tensor for place in self._places[block])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def stored_bytes(self, block: int) -> int:
        """What a block takes in the checkpoint's files."""
        return stored_bytes(self._headers[block])

    def read(self, block: int) -> Mapping[str, Tensor]:
        """The tensors of a block in the host's memory, by the model's names.

        Raises:
            SourceError: a file has become shorter or unreadable, or holds something else than when
                its header was read.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        places = self._places[block]
        empty = [place.tensor for place in places]
        content = {header.name: Unread(header) for header in self._headers[block]}
        try:
            convert_and_load_state_dict_in_model(self._shape, content, self._rules)
            found = {place.full_name: place.tensor.detach() for place in places}
        finally:
            for place, tensor in zip(places, empty, strict=True):
                place.put(tensor)
        for name, tensor in found.items():
            if tensor.is_meta:
                raise SourceError(
                    f"block {block} of the checkpoint lacks {name}.",
                    fix="check that config.json belongs to these weights.",
                )
        return found


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise where a tensor holds NaN or Inf.

    Raises:
        SourceError: one does, which is named.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        lowest, highest = torch.aminmax(tensor)
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            raise SourceError(
                f"weight {name} holds NaN or Inf.",
                fix="repair or download the checkpoint again; such a model has no KL.",
            )
