"""Models of the Hugging Face hub: downloaded into its cache, or their headers alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoquant.errors import SourceError
from autoquant.source.folder import OTHER_FORMS
from autoquant.source.headers import Headers, tensor_header

_OTHER_WEIGHTS = [*OTHER_FORMS, *(f"*/{name}" for name in OTHER_FORMS)]
"""Patterns of paths in a repository."""


def fetch(model: str, revision: str | None, *, only: list[str] | None = None) -> Path:
    """The snapshot of `model` in the cache, downloaded as far as it is not there.

    Args:
        model: a hub id.
        revision: branch, tag or commit.
        only: names of the files wanted; without it, all but other forms of the weights.

    Raises:
        SourceError: not on the hub, not reachable, or not permitted.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=only, ignore_patterns=_OTHER_WEIGHTS
            )
        )


def fetch_headers(model: str, snapshot: Path) -> Headers:
    """The headers of a snapshot's weight files, read over the network without their weights.

    The files are named as in `snapshot`, where they need not exist.

    Raises:
        SourceError: not reachable, not safetensors, or damaged.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model):
        remote = HfApi().get_safetensors_metadata(model, revision=snapshot.name)
    parts = []
    for name, content in sorted(remote.files_metadata.items()):
        entries = [
            tensor_header(
                snapshot / name,
                tensor,
                {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets},
                base=0,
            )
            for tensor, info in content.tensors.items()
        ]
        parts.append((snapshot / name, entries, content.metadata))
    return Headers.of(parts)


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        yield
    except HFValidationError:
        raise SourceError(
            f"{model!r} is neither a folder nor a hub id.", fix="check the path."
        ) from None
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise SourceError(
            f"{model!r} has no safetensors weights that can be read: {_line(error)}",
            fix="pass a model whose weights are stored as safetensors.",
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{model!r} is not a folder here, and the hub gave no model of that name: "
            f"{_line(error)}",
            fix="check the name and the connection; HF_TOKEN opens gated models, and with "
            "HF_HUB_OFFLINE the model has to be in the cache.",
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
