"""Text from data sets of the hub: one by its id, or the mixture that models are calibrated on."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from autoquant.data.chat import Conversation
from autoquant.data.records import document
from autoquant.errors import SourceError

MIXTURE = "mixture"
"""Name of the default source of any model but the bundled one: equal parts of `PARTS`."""

MAX_DOCUMENTS = 100_000
"""Documents taken from a streamed data set: far more than any search reads."""

ANSWER_SECONDS = 10.0
"""How long the hub may take to answer at all."""

PART_DOCUMENTS = 512
"""Documents taken from each part of the mixture: together some two million tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A data set of the mixture. All are public and ask for no terms to be accepted."""

    name: str
    split: str
    config: str | None = None
    column: str | None = None
    """The column of the text, of records that hold other strings too."""

    def documents(self) -> Iterator[str | Conversation]:
        """Yield its first documents.

        Raises:
            SourceError: a record without text.
            Exception: whatever the hub's client raises.
        """
        rows = islice(_rows(self.name, self.split, self.config), PART_DOCUMENTS)
        for number, record in enumerate(rows):
            kept = record if self.column is None else {"text": record.get(self.column)}
            yield document(kept, f"{self.name} row {number}")


PARTS = (
    Part(name="HuggingFaceH4/ultrachat_200k", split="train_sft"),
    Part(name="abisee/cnn_dailymail", config="3.0.0", split="train", column="article"),
    Part(name="codeparrot/codeparrot-clean-valid", split="train", column="content"),
    Part(name="openai/gsm8k", config="main", split="train"),
)
"""Conversations, prose, code and mathematics. Equal parts serve a general model; text of one's own
use serves that use better."""


def is_reachable() -> bool:
    """Whether the hub answers, whatever it says of the first part of the mixture."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(PARTS[0].name, timeout=ANSWER_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # the hub client raises a dozen unrelated types where nothing answers
        return False
    return True


def mixture_documents() -> Iterator[str | Conversation]:
    """Yield the documents of the mixture, part after part.

    Raises:
        SourceError: a part cannot be loaded.
    """
    for part in PARTS:
        try:
            yield from part.documents()
        except SourceError:
            raise
        except Exception as error:  # the hub client raises a dozen unrelated types
            raise SourceError(
                f"calibration text is by default a mixture from the hub, and loading "
                f"{part.name} failed: {_summary(error)}",
                fix="pass --calibration FILE or FOLDER with text like that which the model will "
                "see, --calibration stdlib for the source of Python's standard library, or make "
                "the hub reachable.",
            ) from error


def data_set_documents(calibration: str) -> Iterator[str | Conversation]:
    """Yield the documents of a data set, `org/name` or `org/name:split`.

    Raises:
        SourceError: it cannot be loaded, or a record has no text.
    """
    name, _, split = calibration.partition(":")
    try:
        rows = islice(_rows(name, split or "train", None), MAX_DOCUMENTS)
        for number, record in enumerate(rows):
            yield document(record, f"{calibration} row {number}")
    except SourceError:
        raise
    except Exception as error:  # see above
        raise SourceError(
            f"calibration {calibration!r} is no file or folder here, and loading it as a data set "
            f"failed: {_summary(error)}",
            fix="check the path, or pass a data set id as org/name:split with the hub reachable; "
            "of a gated one accept the terms on the hub and log in (`hf auth login`).",
        ) from error


def _rows(name: str, split: str, config: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    yield from load_dataset(name, config, split=split, streaming=True)


def _summary(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
