"""Which safetensors files make up a checkpoint folder, and whether its index agrees with them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoquant.errors import SourceError
from autoquant.source.folder import require_own, stays_inside
from autoquant.source.headers import Headers
from autoquant.source.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_FILE_OF_WEIGHTS = "transformers_weights"

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")


def read_checkpoint_headers(folder: Path) -> Headers:
    """The headers of every weight file of `folder`.

    Raises:
        SourceError: no safetensors weights, a missing or damaged file, an index that names other
            tensors than its files hold, or a file outside of the checkpoint.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise _no_weights(folder)
        return Headers.read((inside(folder, SINGLE_FILE),))
    weight_map = _weight_map(inside(folder, INDEX_FILE))
    names = sorted(set(weight_map.values()))
    if single.exists() and names != [SINGLE_FILE]:
        raise SourceError(
            f"{folder} holds {SINGLE_FILE} and an {INDEX_FILE} that names other files: "
            "which of the two is meant cannot be known.",
            fix="remove the one that is left over.",
        )
    files = tuple(inside(folder, name) for name in names)
    _require_every_shard(folder, names)
    headers = Headers.read(files)
    _require_agreement(index, weight_map, headers)
    return headers


def holds_weights(folder: Path) -> bool:
    """Whether `folder` has a weight file of any kind, readable or not, or an index of some."""
    endings = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ADAPTER)
    return any(file.name.endswith(endings) for file in folder.iterdir())


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, which has to be a file of the checkpoint itself.

    A snapshot in the Hugging Face cache consists of links into the cache entry's `blobs` folder;
    no other link may leave the folder.

    Raises:
        SourceError: the file is missing or lies elsewhere.
    """
    path = folder / name
    if Path(name).name != name or not stays_inside(folder, path):
        raise SourceError(
            f"{folder} names the file {name!r}, which lies outside of the folder.",
            fix="copy the file into the folder; a checkpoint may not reach elsewhere.",
        )
    if not path.exists():
        raise SourceError(
            f"{path} is missing.",
            fix="download the model again; an interrupted download leaves such gaps.",
        )
    require_own(folder, path)
    return path


def require_no_redirection(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise if transformers or an engine would read other weights than `read_checkpoint_headers`.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        SourceError: a key of the config names a file of weights, or an adapter lies beside them.
    """
    for part in (config, config.get("text_config")):
        named = part.get(_FILE_OF_WEIGHTS) if isinstance(part, dict) else None
        if named is not None:
            raise SourceError(
                f"{folder}/config.json names its weights in {_FILE_OF_WEIGHTS}, {named!r}: "
                f"transformers reads that file, and engines read {SINGLE_FILE} or {INDEX_FILE}.",
                fix=f"remove the key from a copy of the model whose {SINGLE_FILE} is that file.",
            )
    if (folder / ADAPTER).exists():
        raise SourceError(
            f"{folder} holds {ADAPTER} beside its weights: transformers changes them by it.",
            fix="merge the adapter into the weights, or move it out of the folder.",
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map.", fix="download the file again.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise SourceError(
                f"{index} maps {tensor} to {file!r}, which is not a file name.",
                fix="download the file again.",
            )
    return weight_map


def _require_every_shard(folder: Path, names: list[str]) -> None:
    series = {(m["stem"], m["total"]) for m in map(_SHARD.fullmatch, names) if m}
    for file in sorted(folder.glob("*.safetensors")):
        shard = _SHARD.fullmatch(file.name)
        if shard and (shard["stem"], shard["total"]) in series and file.name not in names:
            raise SourceError(
                f"{file} is a shard of this checkpoint that {INDEX_FILE} does not name.",
                fix=f"download {INDEX_FILE} again, or remove the file.",
            )


def _require_agreement(index: Path, weight_map: dict[str, str], headers: Headers) -> None:
    for name, file in weight_map.items():
        if name not in headers or headers[name].file.name != file:
            where = f"in {headers[name].file.name}" if name in headers else "in no file"
            raise SourceError(
                f"{index} places {name} in {file}, and it is {where}.",
                fix="download the index and its files again, from one revision.",
            )
    for tensor in headers:
        if tensor.name not in weight_map:
            raise SourceError(
                f"{tensor.file} holds {tensor.name}, which {INDEX_FILE} does not name.",
                fix="download the index and its files again, from one revision.",
            )


def _no_weights(folder: Path) -> SourceError:
    present = sorted(file.name for file in folder.iterdir() if file.is_file())
    shards = [name for name in present if _SHARD.fullmatch(name)]
    if shards:
        return SourceError(
            f"{folder} holds {shards[0]} and no {INDEX_FILE}.", fix=f"download {INDEX_FILE} too."
        )
    pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return SourceError(
            f"{folder} holds {pickled[0]} and no safetensors; pickled weights are not read.",
            fix="save the model again with save_pretrained, which writes safetensors.",
        )
    if ADAPTER in present:
        return SourceError(
            f"{folder} holds an adapter and no model.", fix="merge the adapter into its base model."
        )
    return SourceError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.",
        fix="pass the folder that save_pretrained or a download has filled.",
    )
