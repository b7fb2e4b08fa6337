"""The model to be quantized: a folder or a hub id, opened without reading its weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autoquant.errors import ConfigError, SourceError
from autoquant.source import hub, stored_forms
from autoquant.source.architecture import architecture_headers, has_own_head, untied
from autoquant.source.codes import without_codes
from autoquant.source.contents import Contents
from autoquant.source.declared import Declared, find_declared, without_declaration
from autoquant.source.folder import require_own_files
from autoquant.source.headers import Headers
from autoquant.source.json_file import read_json_object
from autoquant.source.shards import (
    INDEX_FILE,
    holds_weights,
    inside,
    read_checkpoint_headers,
    require_no_redirection,
)

CONFIG_FILE = "config.json"
REFERENCE_MODEL = Path(__file__).parents[1] / "reference_model"
"""The small trained model that AutoQuant brings along."""

REFERENCE_NAME = "autoquant-reference"
"""What it is called where its folder's path would say nothing."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Dtypes of the weights that can be quantized."""

DIGEST_KIND = "sha256:"
"""How a digest begins that covers every byte; those of earlier versions covered samples."""

_CACHE_ENTRY = "models--"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint folder that has been checked as far as its headers and its config go."""

    model: str
    """The folder or the hub id, as the user wrote it."""
    path: Path
    config: Mapping[str, Any] = field(repr=False)
    """config.json without a declaration of codes, whose weights `headers` gives in BF16, and with
    the dtype that wider weights are computed in."""
    headers: Headers = field(repr=False)
    revision: str | None
    """Commit on the hub, or None for a plain folder."""
    has_weights: bool = True
    """False if the headers were derived from config.json."""

    @cached_property
    def contents(self) -> Contents:
        """Of the weight files; `contents.digests(progress)` tells how `digest` gets on."""
        return Contents(self.headers.files)

    @cached_property
    def digest(self) -> str:
        """The identity of the model: `sha256:` and the hash of config, headers and all contents.

        Every byte counts. Weight files that are not known to `contents` are read for it.

        Raises:
            SourceError: a weight file cannot be read, or is not there.
        """
        identity = {
            "config": self.config,
            "tensors": {name: [t.dtype, t.shape] for name, t in self.headers.tensors.items()},
            "files": self.contents.digests(),
        }
        text = json.dumps(identity, sort_keys=True)
        return DIGEST_KIND + hashlib.sha256(text.encode()).hexdigest()

    @property
    def hub_id(self) -> str | None:
        """`Qwen/Qwen3-8B` for a snapshot in the Hugging Face cache, None for a plain folder."""
        entry = self.path.resolve().parent.parent.name
        if self.revision is None or not entry.startswith(_CACHE_ENTRY):
            return None
        return entry.removeprefix(_CACHE_ENTRY).replace("--", "/", 1)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config."""
        return text_config(self.config)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config, which multimodal models nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model or a checkpoint.

    Raises:
        SourceError: missing, unreadable, no JSON object, or a model type that is no name.
    """
    config = read_json_object(inside(folder, CONFIG_FILE))
    for part in (config, text_config(config)):
        kind = part.get("model_type")
        if kind is not None and not isinstance(kind, str):
            raise SourceError(
                f"{folder / CONFIG_FILE} has the model_type {kind!r}, which is no name.",
                fix=f"download {CONFIG_FILE} again.",
            )
    return config


def open_source(model: str | Path, *, revision: str | None = None, weights: bool = True) -> Source:
    """Open a folder, or fetch a hub id into the Hugging Face cache and open it.

    Args:
        model: a folder, an id such as `Qwen/Qwen3-8B`, or `autoquant-reference`, the bundled
            model. `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as they do elsewhere.
        revision: branch, tag or commit on the hub.
        weights: False leaves the weights of a hub id on the hub and reads their headers over the
            network, and derives those of a folder without weights from its config.json; the digest
            of such a source cannot be told.

    Raises:
        ConfigError: a revision of a folder.
        SourceError: not found, incomplete, damaged, or already quantized.
    """
    path = Path(model)
    if str(model) == REFERENCE_NAME and not path.exists():
        path = REFERENCE_MODEL
    has_weights = True
    if path.is_dir() and revision is not None:
        raise ConfigError(
            f"revision {revision} was asked for, and {model} is a folder.",
            fix="leave the revision out, or pass a hub id.",
        )
    if not path.is_dir():
        path, headers = _open_hub(model, revision, weights)
    elif weights or holds_weights(path):
        headers = _headers(path)
    else:
        _require_config(path)
        headers, has_weights = architecture_headers(path), False
    config = read_config(path)
    require_no_redirection(path, config)
    if weights:
        require_own_files(path)
    declared = find_declared(path, config)
    weights_of_codes = without_codes(headers, declared)
    if declared is not None:
        _require_read(path, declared, weights_of_codes, has_weights)
        config = without_declaration(config)
    headers = stored_forms.in_bf16(weights_of_codes)
    if any(tensor.stored_dtype in stored_forms.WIDE for tensor in headers):
        config = stored_forms.saying_bf16(config)
    if has_weights and has_own_head(config, text_config(config), headers):
        config = untied(config)
    return Source(
        model=REFERENCE_NAME if path == REFERENCE_MODEL else str(model),
        path=path,
        config=config,
        headers=stored_forms.apart(headers, config, text_config(config).get("hidden_size")),
        revision=_revision(path),
        has_weights=has_weights,
    )


def _open_hub(model: str | Path, revision: str | None, weights: bool) -> tuple[Path, Headers]:
    """The snapshot of a hub id, and its headers."""
    path = Path(model)
    if path.exists():
        raise SourceError(f"{model} is a file.", fix="pass the folder that holds it.")
    if isinstance(model, Path) or path.is_absolute() or model.startswith((".", "~")):
        raise SourceError(f"the folder {model} does not exist.", fix="check the path.")
    if weights:
        snapshot = hub.fetch(model, revision)
        return snapshot, _headers(snapshot)
    snapshot = hub.fetch(model, revision, only=[CONFIG_FILE, INDEX_FILE])
    try:
        return snapshot, _headers(snapshot)
    except SourceError:
        return snapshot, hub.fetch_headers(model, snapshot)


def _headers(path: Path) -> Headers:
    _require_config(path)
    return read_checkpoint_headers(path)


def _require_config(path: Path) -> None:
    if not (path / CONFIG_FILE).exists():
        raise SourceError(
            f"{path} holds no {CONFIG_FILE}.", fix="pass a model folder as save_pretrained writes."
        )


def _require_read(path: Path, declared: Declared, headers: Headers, has_weights: bool) -> None:
    """Raise if a quantization is declared that the tensors do not show.

    Block FP8 that has been dequantized keeps its declaration, and is the same model.
    """
    if any(tensor.scales is not None for tensor in headers):
        return
    if declared.is_read and (not has_weights or declared.block is not None):
        return
    raise SourceError(
        f"{path} is already quantized ({declared}), or so it says: none of its tensors is.",
        fix="pass the unquantized model; if these are its weights, remove the declaration.",
    )


def _revision(path: Path) -> str | None:
    snapshot = path.resolve()
    return snapshot.name if snapshot.parent.name == "snapshots" else None
