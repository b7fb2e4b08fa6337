"""One block of a model, run on this machine to see what it takes."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from autoquant.codes.book import CodeBook
from autoquant.codes.held import Weights
from autoquant.codes.statistics import StatisticsStore
from autoquant.errors import SourceError, first_line
from autoquant.formats import BF16, Choice
from autoquant.forward.backward import Backward, pieces_of
from autoquant.forward.check import NOT_BLOCK_BY_BLOCK
from autoquant.forward.flow import BF16_MODEL, Flow, Flows, entered
from autoquant.forward.room import Room
from autoquant.forward.taps import Taps
from autoquant.forward.trunk import Part
from autoquant.measure.compare import Batch, Cache, Comparison
from autoquant.measure.gradient import random_pull
from autoquant.measure.scorer import Scorer
from autoquant.measure.sketch import LogitSketch
from autoquant.measure.statistics.chunks import Chunk
from autoquant.measure.statistics.moments import collect_of_block
from autoquant.measure.statistics.weighing import Sizes, Weigher, by_layer
from autoquant.model.inputs import InputScale, fill_unseen
from autoquant.model.live import QuantizedModel
from autoquant.model.loading import LoadedModel, choose_device, load_model
from autoquant.model.memory import keep_freed_memory
from autoquant.model.streaming.placement import MOST_PACKED, Allowance, free_host_bytes
from autoquant.plan.activation_mode import Target
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup
from autoquant.plan.plan import Plan
from autoquant.run.config import PlanConfig
from autoquant.run.machines.forecast import Forecast

SEQUENCES = 2
"""Whose moments are summed: one that codes are fitted to, and one that is held out."""
REPEATS = 2
"""Of what is measured, the least of which counts."""
WRITTEN_BYTES = 1 << 26
"""Of the file that is written to see how fast that is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSeconds:
    """Seconds of what a search does with one block, and with one batch behind all blocks."""

    opened: float
    """Until the model is there without its blocks: of the processor, since the program began."""
    read: float
    """To have the block from its files."""
    brought: float
    """To have it for one more pass."""
    observed: float
    """A batch through the block, its inputs looked at."""
    forward: float
    """The same without that."""
    candidate: float
    """Under quantized choices, whose decoded weights are there."""
    backward: float
    """Back again, with the products of every choice."""
    summed: float
    """A batch through the block, with second moments of its inputs; 0 where none are needed."""
    weighed: float
    """Back again, with the size of gradients at products; 0 where no moments are needed."""
    encoded: float
    """One choice of the block, encoded from the weight alone and decoded."""
    fitted: float
    """The same, fitted to moments."""
    pulled: float
    """The gradient of a batch's logits."""
    referred: float
    """A batch's logits of the BF16 model."""
    compared: float
    """A batch's logits with those of the BF16 model, which are there."""
    probed: float
    """The same with a sketch."""
    scored: float
    """The same with agreement and likelihoods."""
    written_byte: float
    """A byte to a file."""


class Bench:
    """One block of a model, and what a search does with it.

    Args:
        config: of the search.
        plan: what it names, opened.
        forecast: where weights will be.
        clock: seconds.
    """

    def __init__(
        self, config: PlanConfig, plan: Plan, forecast: Forecast, clock: Callable[[], float]
    ) -> None:
        self.device = choose_device(config.device)
        self._plan, self._weights, self._now = plan, forecast.weights, clock
        sizes, self._stored = forecast.sizes.blocks, forecast.sizes.stored
        searched = {g.layer for g in plan.groups if len(plan.options.choices[g.name]) > 1}
        inside = [layer for layer in searched if layer is not None]
        if not inside:
            raise _cannot("no block has a group that is searched")
        self.layer = max(inside, key=lambda layer: (sizes[layer], layer))
        self.blocks = sum(sizes) / sizes[self.layer]
        self._groups = tuple(g for g in plan.groups if g.layer == self.layer)
        disk = Allowance(
            weights=Weights.DISK,
            device_bytes=config.allowance.device_bytes,
            host_bytes=config.allowance.host_bytes,
        )
        self._loaded: LoadedModel = load_model(
            plan.source.path,
            self.device,
            trust_remote_code=config.trust_remote_code,
            allowance=disk,
        )
        self._opened = time.process_time()
        if forecast.weights is Weights.RESIDENT:
            keep_freed_memory()
        kept = MOST_PACKED if forecast.weights is Weights.RESIDENT else 0
        self._statistics = StatisticsStore.temporary()
        self._quantized = QuantizedModel(
            self._loaded.model,
            self._groups,
            mode=Target.BLACKWELL.mode,
            decoded_bytes=kept,
            packed_bytes=kept,
            statistics=self._statistics,
            store=self._loaded.store,
        )
        self._effects: list[Taps] = []
        """What gradients found, which stays between buffers that are free again, as in a search."""
        self._scorer = Scorer(self._quantized, self.device, room=Room(self.device), cache_bytes=0)
        length = min(config.longest, self._loaded.max_length)
        rows = max(1, min(config.batch_tokens, config.search_tokens) // length)
        vocabulary = self._scorer.trunk.head.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(vocabulary, (rows, length), generator=generator)

    def measure(self) -> BlockSeconds:
        """Everything, on the block.

        In the order of a search: gradients leave free buffers in the heap of a CPU, between what
        they found. A forward that fits these needs no fresh pages, which take half of the time of a
        small block.

        Raises:
            SourceError: the block needs more than the state before it.
        """
        read = self._read()
        with self._scorer.trunk.open(self.layer):
            try:
                self._run(BF16_MODEL)
            except NOT_BLOCK_BY_BLOCK as error:
                raise _cannot(first_line(error)) from error
            with self._quantized.observing():
                observed = self._timed(partial(self._run, BF16_MODEL))
            known, _ = fill_unseen(self._quantized.observed_ranges())
            self._quantized.set_input_scales({n: InputScale(amax=a) for n, a in known.items()})
            plain, costly = (self._choices(is_costly=own) for own in (False, True))
            weighed, summed = (self._weighed(), self._summed()) if costly else (0.0, 0.0)
            fitted = [self._fitted(choice) for choice in costly]
            encoded = [self._timed(partial(self._coded, choice)) for choice in plain]
            pulled, backward = self._backward()
            forward = self._timed(partial(self._run, BF16_MODEL))
            tried = map(self._all_in, plain or costly)
            candidates = [self._timed(partial(self._run, own)) for own in tried]
            brought = self._brought(read)
        return BlockSeconds(
            opened=self._opened,
            read=read,
            brought=brought,
            observed=observed,
            forward=forward,
            candidate=float(np.mean(candidates)),
            backward=backward,
            summed=summed,
            weighed=weighed,
            encoded=float(np.mean(encoded)) if encoded else 0.0,
            fitted=float(np.mean(fitted)) if fitted else 0.0,
            pulled=pulled,
            written_byte=_written_byte(),
            **self._head(),
        )

    @contextmanager
    def _clock(self) -> Iterator[list[float]]:
        """Seconds of a `with` block, with all that a GPU was given to do."""
        found: list[float] = []
        self._wait()
        started = self._now()
        yield found
        self._wait()
        found.append(self._now() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _timed(self, work: Callable[[], object]) -> float:
        """Least seconds of work that has run before: kernels are compiled by then, and what other
        programs do on the machine only adds to it.
        """
        work()
        found = []
        for _ in range(REPEATS):
            with self._clock() as seconds:
                work()
            found += seconds
        return min(found)

    def _read(self) -> float:
        """Seconds until the block is there: for the first time where memory cannot keep the files
        of all blocks between two passes, else for the second.
        """
        store, others = self._loaded.store, [n for n in (0, 1) if n != self.layer]
        found = []
        for _ in range(2 if others else 1):
            store.settle()
            with self._clock() as seconds:
                store.open(self.layer)
            found.append(seconds[0])
            if others and len(found) < 2:
                store.open(others[0])
        return found[0] if self._stored > free_host_bytes() else found[-1]

    def _brought(self, read: float) -> float:
        """The same from where it is kept between passes."""
        if self._weights is not Weights.HOST or self.device.type != "cuda":
            return read
        block = self._scorer.trunk.blocks[self.layer]
        kept = [own.detach().cpu().pin_memory() for own in block.parameters()]
        return self._timed(lambda: [own.to(self.device, non_blocking=True) for own in kept])

    @cached_property
    def _entered(self) -> Flow:
        """The forward of the batch before the block."""
        room = self._scorer.room
        with torch.no_grad():
            parts = entered(self._scorer.trunk, room, room.parts(self.tokens.to(self.device)))
        return self._before(parts)

    def _before(self, parts: tuple[Part, ...]) -> Flow:
        """A forward whose states before the block are those that enter the first."""
        states = tuple(part.state for part in parts)
        return Flow(parts=parts, boundaries=[states] * self._scorer.trunk.stages)

    def _run(self, assignment: Assignment, *, keep: bool = False) -> Flow:
        """The batch through the block."""
        return self._through(self._entered, assignment, keep=keep)

    def _through(self, before: Flow, assignment: Assignment, *, keep: bool) -> Flow:
        flow = Flow(
            parts=before.parts, assignment=assignment, start=self.layer, after=before, keep=keep
        )
        Flows(self._scorer.trunk, self._quantized, self._scorer.room, [flow]).visit(self.layer)
        return flow

    def _choices(self, *, is_costly: bool) -> list[Choice]:
        legal = (self._plan.options.choices[group.name] for group in self._groups)
        every = dict.fromkeys(choice.of_weight for own in legal for choice in own)
        return [c for c in every if c != BF16 and c.format.is_costly(c) == is_costly]

    def _able(self, choice: Choice) -> list[LayerGroup]:
        """Groups of the block that may take a choice."""
        options = self._plan.options.choices
        return [g for g in self._groups if choice in {own.of_weight for own in options[g.name]}]

    def _all_in(self, choice: Choice) -> Assignment:
        """All groups that may take a choice in it; codes that are fitted take no other time to be
        multiplied than the nearest.
        """
        return Assignment.of({group.name: choice.plain for group in self._able(choice)})

    def _coded(self, choice: Choice) -> None:
        """Encode and decode the block in a choice."""
        weights = self._quantized.weights
        book = CodeBook(weights, memory_bytes=0, statistics=self._statistics)
        for group in self._able(choice):
            for unit in book.units(group):
                book.unit(group, unit, choice).decode()

    def _fitted(self, choice: Choice) -> float:
        """Seconds of it, of a choice that is made once."""
        with self._clock() as seconds:
            self._coded(choice)
        return seconds[0]

    def _chunks(self) -> list[Chunk]:
        """Sequences whose moments are summed."""
        rows = [self.tokens[i % len(self.tokens)][None] for i in range(SEQUENCES)]
        return [Chunk(row.to(self.device), number) for number, row in enumerate(rows)]

    def _summed(self) -> float:
        """Seconds of a batch whose inputs' moments are summed."""
        work = partial(
            collect_of_block, self._scorer, self._chunks(), self._groups, self._statistics
        )
        with self._clock() as seconds:
            work()
        return seconds[0] * len(self.tokens) / SEQUENCES

    def _weighed(self) -> float:
        """Seconds of a batch's gradients back through the block, for the weights of its rows."""
        scorer, chunks, flows = self._scorer, self._chunks(), []
        for chunk in chunks:
            flow = self._through(self._before(chunk.flow(scorer).parts), BF16_MODEL, keep=True)
            flow.finish(scorer.trunk, scorer.room)
            flows.append(flow)
        weigher = Weigher(scorer, chunks, flows, by_layer(self._groups), Sizes(SEQUENCES))
        with self._clock() as seconds:
            weigher.visit(self.layer)
        return seconds[0] * len(self.tokens) / SEQUENCES

    def _backward(self) -> tuple[float, float]:
        """Seconds of the gradient of a batch's logits, and of the way back through the block."""
        trunk, room = self._scorer.trunk, self._scorer.room
        keys = [
            (group.name, choice)
            for group in self._groups
            for choice in self._plan.options.choices[group.name]
            if choice != BF16
        ]
        found = []
        for _ in range(1 + REPEATS):
            flow = self._run(BF16_MODEL, keep=True)
            flow.finish(trunk, room)
            pieces = pieces_of(trunk, room, flow)
            tokens = [piece.tokens.numel() for own in pieces for piece in own]
            taps = [Taps(self._quantized, keys, count) for count in tokens]
            self._effects += taps
            with self._clock() as pulled:
                pull = random_pull(self._scorer, 0, 0)
                installed = [tap.installed for tap in taps]
                back = Backward(trunk, room, flow, pieces, installed, pull)
            with self._clock() as backward:
                back.visit(self.layer)
            found.append((pulled[0], backward[0]))
        return min(own for own, _ in found), min(own for _, own in found)

    def _head(self) -> dict[str, float]:
        """Seconds of what is compared behind all blocks."""
        flow = self._run(BF16_MODEL)
        with torch.no_grad():
            flow.finish(self._scorer.trunk, self._scorer.room)
        tokens = self.tokens.to(self.device)
        batch = Batch(tokens, np.arange(len(tokens)), reference=flow.hidden)
        head, sketch = self._scorer.head, LogitSketch()
        anew, comparison = (Comparison(head, Cache(size)) for size in (0, sys.maxsize))
        both = self._timed(lambda: anew.kl(batch, flow.hidden))
        compared = self._timed(lambda: comparison.kl(batch, flow.hidden))
        return {
            "referred": max(0.0, both - compared),
            "compared": compared,
            "probed": self._timed(lambda: comparison.kl_and_sketch(batch, flow.hidden, sketch)),
            "scored": self._timed(lambda: comparison.fully(batch, flow.hidden)),
        }


def _written_byte() -> float:
    """Seconds of a byte that is written to a file."""
    content = bytes(WRITTEN_BYTES)
    with tempfile.TemporaryFile() as file:
        started = time.monotonic()
        file.write(content)
        file.flush()
        return (time.monotonic() - started) / WRITTEN_BYTES


def _cannot(why: str) -> SourceError:
    return SourceError(
        f"--measure runs one block of the model by itself, and cannot: {why}.",
        fix="leave --measure out; --forecast alone says what memory and passes a search takes.",
    )
