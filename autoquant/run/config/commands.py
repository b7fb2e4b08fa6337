"""The settings of each command that reads a model.

Pydantic lists the fields of the last base first, so bases stand in the reverse order of `--help`.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_serializer, model_validator

from autoquant.errors import ConfigError
from autoquant.measure.method import ProbeMethod
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.model_costs import CostKind
from autoquant.run.config.parts import (
    BreakdownConfig,
    CacheConfig,
    InputsConfig,
    LayoutConfig,
    LoadedConfig,
    MeasuredConfig,
    ReportConfig,
    SpaceConfig,
    TrackingConfig,
)
from autoquant.run.config.setting import Setting
from autoquant.run.config.types import (
    Bits,
    Budgets,
    ExistingFile,
    Folder,
    Natural,
    NewFile,
    Positive,
    Seconds,
)
from autoquant.search.samplers import OPTUNA_SAMPLERS, OWN_SAMPLER

_BUDGET = "Most stored bits per element of the source model, scales included"

BudgetScope = Annotated[
    Scope,
    Setting("Budget", "What the budget counts: the whole checkpoint, or the layers left open."),
]


ProbeWith = Annotated[
    ProbeMethod,
    Setting(
        "Search",
        "How the KL of each group is found: measured in every choice (exact); measured in one "
        "choice and scaled to the others by gradients (screened); or by gradients alone.",
    ),
]
Trials = Annotated[
    Natural,
    Setting(
        "Search",
        "Whole assignments to measure, beyond the fixed recipes, the solver's optima and the "
        "check of their scale rules and roundings.",
        "N",
    ),
]
TrialsAtOnce = Annotated[
    Positive,
    Setting(
        "Search",
        "Trials of a round: each worker measures its share of them in one pass over the weights, "
        "which saves time where these are streamed. They race against the best trial before them.",
        "N",
    ),
]


class PlanConfig(ReportConfig, SpaceConfig):
    """The settings of `autoquant plan`."""

    command: ClassVar[str] = "plan"

    budget_bpe: Annotated[Bits | None, Setting("Budget", f"{_BUDGET}.", "BITS")] = None
    budget_scope: BudgetScope = Scope.CHECKPOINT
    forecast: Annotated[
        bool,
        Setting(
            "Output",
            "Say where a search with these settings would keep the weights on this machine, what "
            "memory it would take, and how often it would read weights that do not fit; no weights "
            "are read now, and it takes seconds.",
        ),
    ] = False
    measure: Annotated[
        bool,
        Setting(
            "Output",
            "Read one block of the model, run it on this machine, and say how long a search with "
            "these settings would take, part by part; --forecast is said too.",
        ),
    ] = False
    probe: ProbeWith = ProbeMethod.SCREENED
    trials: Trials = 30
    trials_at_once: TrialsAtOnce = 1

    @property
    def budget(self) -> Budget | None:
        """The budget, if one is given."""
        return None if self.budget_bpe is None else Budget(self.budget_bpe, self.budget_scope)


class ProbeConfig(CacheConfig, InputsConfig, SpaceConfig, LoadedConfig):
    """The settings of `autoquant probe`."""

    command: ClassVar[str] = "probe"

    probe: ProbeWith = ProbeMethod.SCREENED
    out: Annotated[
        Folder | None,
        Setting(
            "Output",
            "Run directory; the same command goes on in it.",
            "DIR",
            unset="runs/NAME",
            is_saved=False,
        ),
    ] = None
    resume: Annotated[
        bool,
        Setting(
            "Output",
            "Go on with an earlier run of the same settings; --fresh sets it aside.",
            opposite="fresh",
            is_saved=False,
        ),
    ] = True


class SearchConfig(BreakdownConfig, LayoutConfig, TrackingConfig, ReportConfig, ProbeConfig):
    """The settings of `autoquant search`."""

    command: ClassVar[str] = "search"

    budget_bpe: Annotated[
        Budgets, Setting("Budget", f"{_BUDGET}; several share one set of probes.", "BITS[,BITS...]")
    ]
    budget_scope: BudgetScope = Scope.CHECKPOINT
    cost: Annotated[
        Literal[CostKind.BITS, CostKind.ACTIVE_BYTES],
        Setting(
            "Budget",
            "What the budget limits: stored bits, or what one token reads (top-k of the experts).",
        ),
    ] = CostKind.BITS
    cost_table: Annotated[
        Path | None,
        Setting(
            "Budget",
            "YAML or CSV file that says what each product costs in each choice, for instance in "
            "microseconds. With --cost-limit it is a second limit.",
            "FILE",
        ),
    ] = None
    cost_limit: Annotated[
        Seconds | None,
        Setting("Budget", "Largest summed cost of all products, in the table's unit.", "X"),
    ] = None
    sensitivity: Annotated[
        Path | None,
        Setting(
            "Search",
            "Run directory whose probes are used: of `autoquant probe`, or of another search with "
            "the same settings. Or modelopt:FILE, the scores that ModelOpt's auto_quantize saved.",
            "RUN",
            unset="what `autoquant probe` wrote to runs/",
            is_saved=False,
        ),
    ] = None
    trials: Trials = 30
    study_storage: Annotated[
        str | None,
        Setting(
            "Tracking",
            "Add every trial to a study in this storage of Optuna too: sqlite:///FILE, "
            "postgresql://USER@HOST/NAME or grpc://HOST:PORT.",
            "URL",
            unset="study.log alone",
            is_secret=True,
            is_saved=False,
        ),
    ] = None
    sampler: Annotated[
        str,
        Setting(
            "Search",
            "Who proposes the trials: AutoQuant's own (budget); Optuna's (tpe, cmaes, nsgaii, "
            "random), over weights of the sensitivities by role and depth; or module:Class, a "
            "sampler of Optuna's interface over the choices of the groups.",
            "NAME",
        ),
    ] = OWN_SAMPLER
    trials_at_once: TrialsAtOnce = 1
    workers: Annotated[
        Positive,
        Setting(
            "Search",
            "Processes of this machine that measure different trials of a round, each with the "
            "whole model. Results are the same. Needs as many --trials-at-once, or more.",
            "N",
        ),
    ] = 1
    max_seconds: Annotated[
        Seconds | None,
        Setting(
            "Search",
            "Start no trial after S seconds of loading, calibration, probes and trials, those of "
            "interrupted calls included. A finished result stays; --fresh begins anew.",
            "S",
        ),
    ] = None
    max_tokens: Annotated[
        Positive | None,
        Setting(
            "Search",
            "Start no trial after all trials together have used N tokens. A finished result stays; "
            "--fresh begins anew.",
            "N",
        ),
    ] = None
    export: Annotated[
        bool,
        Setting(
            "Output",
            "Write the winner as a checkpoint.",
            unset="for a single budget",
            opposite="no-export",
            is_saved=False,
        ),
    ] = Field(default_factory=lambda given: len(given["budget_bpe"]) == 1)

    @property
    def budget(self) -> Budget:
        """The budget of a search that has one."""
        (bpe,) = self.budget_bpe
        return Budget(bpe, self.budget_scope)

    @property
    def modelopt_state(self) -> Path | None:
        """The file that `--sensitivity modelopt:FILE` names; None for anything else."""
        kind, _, file = str(self.sensitivity or "").partition(":")
        return Path(file) if kind == "modelopt" and file else None

    def of_each_budget(self) -> list[Self]:
        """The same search under each of its budgets."""
        return [self.model_copy(update={"budget_bpe": (bpe,)}) for bpe in self.budget_bpe]

    @model_validator(mode="after")
    def _require_possible(self) -> Self:
        for search in self.of_each_budget():
            _ = search.budget
        if self.sampler not in (OWN_SAMPLER, *OPTUNA_SAMPLERS) and ":" not in self.sampler:
            raise ConfigError(
                f"--sampler {self.sampler} is no sampler.",
                fix=f"name {OWN_SAMPLER}, {', '.join(OPTUNA_SAMPLERS)}, or module:Class.",
            )
        if self.workers > self.trials_at_once:
            raise ConfigError(
                f"--workers {self.workers} share the trials of a round, and "
                f"--trials-at-once {self.trials_at_once} is less.",
                fix=f"give --trials-at-once {self.workers} or more. It decides what a search "
                "finds, since the trials of a round race against what was best before them.",
            )
        return self

    @field_serializer("budget_bpe")
    def _one_or_list(self, budgets: tuple[float, ...]) -> float | list[float]:
        return budgets[0] if len(budgets) == 1 else list(budgets)


class JoinConfig(SearchConfig):
    """The settings of `autoquant join`: those of the search."""

    command: ClassVar[str] = "join"

    @model_validator(mode="after")
    def _require_something_to_share(self) -> Self:
        if self.study_storage is None:
            raise ConfigError(
                "--study-storage is missing: a worker meets its search there.",
                fix="give the URL that the search was given.",
            )
        if self.trials_at_once == 1:
            raise ConfigError(
                "--trials-at-once is 1, and workers share the trials of a round.",
                fix="give the search 2 or more, and the worker as many. It decides what a search "
                "finds, since the trials of a round race against what was best before them.",
            )
        if self.workers > 1:
            raise ConfigError(
                f"--workers {self.workers}: what joins a search is one worker.",
                fix="leave --workers out, and join once for each device (--device cuda:1).",
            )
        return self


class ScoreConfig(BreakdownConfig, MeasuredConfig):
    """The settings of `autoquant score`."""

    command: ClassVar[str] = "score"

    assignment: Annotated[
        ExistingFile | None,
        Setting(
            "Model",
            "Which group has which format, YAML or JSON, such as a search's assignment.yaml.",
            "FILE",
            is_saved=False,
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        Setting("Model", "Exported checkpoint to measure against MODEL.", "DIR", is_saved=False),
    ] = None
    split: Annotated[Literal["search", "report"], Setting("Data", "Tokens to measure on.")] = (
        "report"
    )

    @model_validator(mode="after")
    def _require_one_of_both(self) -> Self:
        if (self.assignment is None) == (self.checkpoint is None):
            given = (
                "neither --assignment nor --checkpoint is"
                if self.assignment is None
                else "both --assignment and --checkpoint are"
            )
            raise ConfigError(
                f"{given} given: `score` measures one of them.",
                fix="give either --assignment FILE or --checkpoint DIR.",
            )
        return self


class ExportConfig(LayoutConfig, CacheConfig, ReportConfig):
    """The settings of `autoquant export`."""

    command: ClassVar[str] = "export"

    assignment: Annotated[
        ExistingFile,
        Setting(
            "Model",
            "Which group has which format, YAML or JSON, such as a search's assignment.yaml.",
            "FILE",
            is_saved=False,
        ),
    ]
    calibrated: Annotated[
        ExistingFile | None,
        Setting(
            "Data",
            "calibration.json of a search: its input ranges are taken, no text is read and the "
            "model is not loaded.",
            "FILE",
            is_saved=False,
        ),
    ] = None
    out: Annotated[
        Folder | None,
        Setting("Output", "New folder for the checkpoint.", "DIR", is_saved=False),
    ] = None
    modelopt_recipe: Annotated[
        NewFile | None,
        Setting(
            "Output",
            "YAML file for a recipe of NVIDIA ModelOpt with the same formats, to train from; "
            "without --out it is all that is written.",
            "FILE",
            is_saved=False,
        ),
    ] = None

    @model_validator(mode="after")
    def _require_something_to_write(self) -> Self:
        if self.out is None and self.modelopt_recipe is None:
            raise ConfigError(
                "neither --out nor --modelopt-recipe: `export` has nothing to write.",
                fix="give --out DIR for a checkpoint, --modelopt-recipe FILE for its formats.",
            )
        return self
