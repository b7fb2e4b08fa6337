"""The expensive state of a search or a score: model, tokens, calibrated scorer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.codes.book import CodeBook
from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.codes.weights import FileWeights
from autoquant.data.text import load_corpus
from autoquant.data.tokens import Split, TokenPlan, make_splits, shortfalls
from autoquant.errors import ConfigError, SourceError
from autoquant.forward.room import Room
from autoquant.measure.ranks.ranks import ALONE, Ranks
from autoquant.measure.scorer import Scorer
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import LoadedModel, choose_device, load_model
from autoquant.model.memory import keep_freed_memory, return_freed_memory
from autoquant.model.shared_inputs import input_disagreements
from autoquant.model.streaming.placement import ANYTHING, Allowance
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.linears import LayerGroup
from autoquant.progress import Progress
from autoquant.source.source import Source


@dataclass(frozen=True, kw_only=True)
class Session:
    """A loaded model with its tokens."""

    loaded: LoadedModel
    scorer: Scorer
    splits: dict[str, Split]
    statistics: StatisticsStore | None = None
    """Of the inputs, where choices rest on them."""

    @property
    def quantized(self) -> QuantizedModel:
        return self.scorer.quantized

    def book_of_export(self, source: Source) -> CodeBook:
        """Where the codes of an export come from: the model, or its files where blocks are
        streamed, since a writer goes through them in the files' order.
        """
        book = self.quantized.book
        if not self.loaded.store.is_streamed:
            return book
        return book.of_other_weights(FileWeights(source.headers))


def open_session(
    source: Source,
    groups: Iterable[LayerGroup],
    *,
    attention: Sequence[str] = (),
    calibration: str,
    tokens: TokenPlan,
    mode: ActivationMode,
    device: str | None,
    allowance: Allowance = ANYTHING,
    trust_remote_code: bool,
    codes: CodeCache | None = None,
    statistics: StatisticsStore | None = None,
    ranks: Ranks = ALONE,
    observer: Progress,
) -> Session:
    """Read the text, load the model, cut the tokens, and check that scoring is exact.

    Args:
        source: what to load.
        groups: the groups that may leave BF16.
        attention: attention modules whose keys and values are cached in FP8.
        calibration: text source, as `load_corpus` takes it.
        tokens: how many tokens go to which split.
        mode: which inputs are quantized.
        device: where to load to; the first GPU, else the CPU, by default.
        allowance: where weights may be.
        trust_remote_code: run code that comes with the model.
        codes: where codes are kept that cost more to make than to read.
        statistics: where moments of the inputs are kept, for codes that rest on them.
        ranks: the processes that batches are dealt to.
        observer: told of progress and shortfalls.

    Raises:
        SourceError: text or model missing, damaged or not understood.
        OutOfMemory: the model does not fit the device.
        ConfigError: more ranks than batches of search tokens.
    """
    corpus = load_corpus(calibration)
    observer.stage("load", 1)
    chosen = choose_device(device)
    loaded = load_model(
        source.path, chosen, trust_remote_code=trust_remote_code, allowance=allowance, peers=ranks
    )
    if not loaded.store.is_streamed:  # blocks that come and go would leave holes
        keep_freed_memory()
    plan = _shortened(tokens, loaded.max_length)
    splits = make_splits(corpus, loaded.tokenizer, plan)
    return_freed_memory()  # of tokens of the whole text, far more than the splits are
    _require_vocabulary(loaded.model, splits)
    _require_batches(splits, ranks)
    for shortfall in shortfalls(splits, plan):
        observer.warn(f"little text, wide intervals: {shortfall}.")
    session = make_session(
        loaded,
        splits,
        groups,
        attention=attention,
        mode=mode,
        codes=codes,
        statistics=statistics,
        ranks=ranks,
        observer=observer,
    )
    observer.step()
    return session


def make_session(
    loaded: LoadedModel,
    splits: dict[str, Split],
    groups: Iterable[LayerGroup],
    *,
    attention: Sequence[str] = (),
    mode: ActivationMode,
    codes: CodeCache | None = None,
    statistics: StatisticsStore | None = None,
    ranks: Ranks = ALONE,
    observer: Progress,
) -> Session:
    """Make a loaded model ready to be measured, and check that scoring is exact.

    Args:
        loaded: changed in place.
        splits: `calibration`, `search` and `report`.
        groups, attention, mode, codes, statistics, ranks, observer: as for `open_session`.

    Raises:
        SourceError: a group's linear cannot be found, or scoring is not exact.
    """
    quantized = QuantizedModel(
        loaded.model,
        groups,
        mode=mode,
        **_cache_bytes(loaded),
        attention=attention,
        codes=codes,
        statistics=statistics,
        store=loaded.store,
    )
    scorer = Scorer(quantized, loaded.device, room=_room(loaded), ranks=ranks)
    split = splits["calibration"]
    for disagreement in input_disagreements(quantized, lambda: scorer.check(split)):
        observer.warn(disagreement)
    return Session(loaded=loaded, scorer=scorer, splits=splits, statistics=statistics)


def _shortened(plan: TokenPlan, max_length: int) -> TokenPlan:
    """The plan with sequences that the model's positions allow."""
    import dataclasses

    return dataclasses.replace(plan, sequence_length=min(plan.sequence_length, max_length))


def _require_vocabulary(model: Any, splits: dict[str, Split]) -> None:
    largest = max(int(batch.max()) for split in splits.values() for batch in split.batches)
    size = model.get_input_embeddings().weight.shape[0]
    if largest >= size:
        raise SourceError(
            f"the tokenizer gives token {largest}, and the model embeds {size} tokens.",
            fix="put the tokenizer of this model beside its weights.",
        )


def _require_batches(splits: dict[str, Split], ranks: Ranks) -> None:
    batches = len(splits["search"].batches)
    if ranks.size > batches:
        raise ConfigError(
            f"{ranks.size} processes share {batches} batches of search tokens: a batch is measured "
            "by one.",
            fix=f"start {batches} processes at most, or make batches smaller (--batch-tokens).",
        )


def _room(loaded: LoadedModel) -> Room:
    if loaded.store.is_streamed:
        return Room.streamed(loaded.device, loaded.left.host, spare_bytes=loaded.left.device)
    return Room(loaded.device, spare_bytes=loaded.left.device)


def _cache_bytes(loaded: LoadedModel) -> dict[str, int]:
    """Memory for codes and for decoded weights."""
    kept = loaded.left.kept
    return {"packed_bytes": kept.packed, "decoded_bytes": kept.decoded}
