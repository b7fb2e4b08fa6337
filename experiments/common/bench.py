"""A subject opened for measurement, beside what the search itself opens."""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from optuna.samplers import BaseSampler

from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.passages import Row, Tokenizer
from autoquant.data.text import Corpus, load_corpus
from autoquant.data.tokens import Split, TokenPlan, batched, make_splits
from autoquant.formats import BF16
from autoquant.measure.calibration import calibrate
from autoquant.measure.evaluator import Evaluator, Measurement, Request
from autoquant.measure.kl import TokenKl
from autoquant.measure.method import ProbeMethod
from autoquant.measure.racing.local import LocalEvaluator
from autoquant.measure.sensitivity import Sensitivity, keys_of
from autoquant.measure.session import Session, open_session
from autoquant.measure.statistics.moments import collect_moments
from autoquant.model.memory import keep_freed_memory
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.observer import Logged
from autoquant.run.sensitivity.probes import Probes
from autoquant.samplers import BudgetSampler
from autoquant.samplers.schedule import Schedule
from autoquant.search.history import History
from autoquant.search.limits import Bounds
from autoquant.search.predictor import Predictor
from autoquant.search.problem import Problem
from autoquant.search.propose.shares import Effort, shared_out
from autoquant.source.source import open_source
from autoquant.store.run_directory import RunDirectory
from autoquant.study.driver import Driver
from autoquant.study.explore import Explored, explore
from autoquant.study.live import LiveStudy
from autoquant.study.record import Sequences, StudyForm
from autoquant.study.sampling import sampler_of
from autoquant.study.space import StudySpace
from experiments.common.subjects import Subject


@dataclass(frozen=True)
class Remembering:
    """An evaluator that measures no request twice: a measurement rests on its request alone."""

    evaluator: Evaluator
    _known: dict[str, Measurement] = field(default_factory=dict, init=False)

    def measure(
        self, requests: Iterable[Request], coming: Sequence[Assignment] = ()
    ) -> Iterator[Measurement]:
        for request in requests:
            key = json.dumps(request.to_dict())
            if key not in self._known:
                (self._known[key],) = self.evaluator.measure([request])
            yield self._known[key]


@dataclass
class Bench:
    """A calibrated model with the search's own splits, and more of its text beside them.

    Args:
        subject: which model.
        space: name or file of a search space.
        tokens: as the search has it, seed included.
        mode: which inputs are quantized.
        folder: for codes that rest on the statistics of inputs; None without such codes.
        weighs_rows: whether rows count by their gradients in these statistics.
    """

    subject: Subject
    space: str
    tokens: TokenPlan
    device: str = "cpu"
    mode: ActivationMode = ActivationMode.W4A4
    folder: Path | None = None
    weighs_rows: bool = True

    def __post_init__(self) -> None:
        keep_freed_memory()
        self._scores: dict[tuple[str, str], TokenKl] = {}
        scorer, split = self.session.scorer, self.splits["calibration"]
        self.calibration = calibrate(scorer, split, lambda: None)
        self.session.quantized.set_input_scales(self.calibration.scales())
        if self.session.statistics is not None:
            groups = self.session.quantized.groups
            if not self.weighs_rows:
                self.session.statistics.count_alike("not asked for")
            collect_moments(scorer, split, groups, self.session.statistics, lambda: None)

    @cached_property
    def evaluator(self) -> Remembering:
        return Remembering(LocalEvaluator(self.session.scorer, self.splits["search"]))

    @cached_property
    def plan(self) -> Plan:
        return make_plan(open_source(self.subject.path), load_space(self.space))

    @cached_property
    def session(self) -> Session:
        open_groups = [g for g in self.plan.groups if self.plan.options.choices[g.name] != (BF16,)]
        return open_session(
            self.plan.source,
            open_groups,
            calibration=str(self.subject.text),
            tokens=self.tokens,
            mode=self.mode,
            device=self.device,
            trust_remote_code=False,
            codes=self._codes,
            statistics=None if self.folder is None else StatisticsStore(self.folder / "statistics"),
            observer=Logged(),
        )

    @property
    def _codes(self) -> CodeCache | None:
        if self.folder is None:
            return None
        digest = self.plan.source.digest
        return CodeCache(self.folder / "codes", made_from=digest, most_bytes=1 << 36)

    @property
    def splits(self) -> dict[str, Split]:
        return self.session.splits

    def fresh(self, tokens: int) -> Split:
        """`fresh_split` of the text that the search has."""
        length = min(self.tokens.sequence_length, self.session.loaded.max_length)
        plan = dataclasses.replace(self.tokens, sequence_length=length)
        corpus = load_corpus(str(self.subject.text))
        return fresh_split(corpus, self.session.loaded.tokenizer, plan, tokens)

    def score(self, assignment: Assignment, split: Split) -> TokenKl:
        """KL of every token; measured once per assignment and split."""
        key = assignment.digest, split.digest
        if key not in self._scores:
            self._scores[key] = self.session.scorer.score(assignment, split)
        return self._scores[key]

    def probe(self, method: ProbeMethod = ProbeMethod.SCREENED) -> Sensitivity:
        """Sensitivities as a search measures them on the search split, interactions included."""
        with (
            tempfile.TemporaryDirectory() as folder,
            RunDirectory.open(Path(folder) / "probes", {}, resume=False) as run,
        ):
            probes = Probes(
                run=run,
                scorer=self.session.scorer,
                split=self.splits["search"],
                keys=tuple(keys_of(self.plan.options.choices)),
                seed=self.tokens.seed,
                observer=Logged(),
            )
            return probes.measure(method)[0]

    def explore(
        self,
        problem: Problem,
        trials: int,
        *,
        effort: Effort | None = None,
        sampler: str = "budget",
        max_tokens: int | None = None,
    ) -> tuple[History, Explored]:
        """Everything that a search measures jointly on the search split, without its files.

        Args:
            problem: what is searched.
            trials: of the refinement.
            effort: the shares of our own proposers, where they are not those of a search.
            sampler: who proposes the trials.
            max_tokens: of all of them together.
        """
        space, history = StudySpace.of(self.plan.accounting), History()
        sequences = Sequences.of(self.splits["search"])
        form = StudyForm(space=space, limits=problem.limits, sequences=sequences)

        def made(predictor: Predictor) -> BaseSampler:
            if effort is not None:
                shares = partial(shared_out, predictor, effort)
                return BudgetSampler.by(problem, space, lambda: Schedule(shares(), 1))
            seed = self.tokens.seed
            return sampler_of(sampler, predictor, space, trials=trials, width=1, seed=seed)

        driver = Driver(
            study=LiveStudy(form),
            history=history,
            evaluator=self.evaluator,
            accounting=self.plan.accounting,
            fits=problem.fits,
            keep=lambda _: None,
        )
        explored = explore(
            problem,
            driver,
            made,
            trials=trials,
            bounds=Bounds(lambda: True, max_tokens),
            timed=lambda _: nullcontext(),
        )
        return history, explored

    def problem(self, bpe: float, sensitivity: Sensitivity) -> Problem:
        return Problem(
            accounting=self.plan.accounting,
            limits=(self.plan.limit(self.subject.budget(bpe)),),
            sensitivity=sensitivity,
        )

    def unmeasured_problem(self, bpe: float) -> Problem:
        """For sizes and budgets, which rest on no measurement."""
        keys = list(keys_of(self.plan.options.choices))
        return self.problem(bpe, Sensitivity(dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)))


def fresh_split(corpus: Corpus, tokenizer: Tokenizer, plan: TokenPlan, tokens: int) -> Split:
    """Sequences of the report side that come after those that a search with `plan` reports on."""
    splits = make_splits(corpus, tokenizer, plan)
    longer = dataclasses.replace(plan, report=plan.report + tokens)
    more = make_splits(corpus, tokenizer, longer)["report"]
    seen = {row.tokens for split in splits.values() for row in _rows(split)}
    rows = [row for row in _rows(more) if row.tokens not in seen]
    return batched("fresh", rows, plan.batch_tokens)


def _rows(split: Split) -> Iterator[Row]:
    for batch, documents, passages in zip(
        split.batches, split.documents, split.passages, strict=True
    ):
        for tokens, *place in zip(batch.tolist(), documents, passages, strict=True):
            yield Row(tuple(tokens), *map(int, place))
