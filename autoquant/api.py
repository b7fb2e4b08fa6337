"""Searches and their runs from Python.

    import autoquant

    run = autoquant.search("Qwen/Qwen3-30B-A3B", budget_bpe=5.0)
    run = autoquant.load_run("runs/NAME")
    run.trials().sort_values("kl").head()
    run.plot_frontier()

Tables are pandas frames: MLflow, which records searches, brings pandas. Pictures are matplotlib
figures, the same as in `report.html`. Everywhere KL is KL(BF16 || quantized) in nats per token, BPE
bits per element of the checkpoint, and sizes bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoquant.formats.kv_cache import KvCacheName
from autoquant.report import html
from autoquant.report.record import RunRecord, TrialRow
from autoquant.store.run_directory import Status

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from autoquant.run.observer import Observer

_TRIAL_COLUMNS = tuple(field.name for field in fields(TrialRow))

__all__ = ["Run", "equalized_copy", "load_run", "search", "search_budgets"]


class Run:
    """A run directory, as it was when it was read.

    Every table and picture of an unfinished run shows what there is; `missing` names the rest.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def __repr__(self) -> str:
        return f"<autoquant.Run {self.path} {self.status}>"

    @property
    def path(self) -> Path:
        return self._record.path

    @property
    def status(self) -> Status:
        """running (or killed), interrupted, failed or finished."""
        return self._record.status

    @property
    def missing(self) -> tuple[str, ...]:
        """What the search has not come to and what another version wrote, in words."""
        return self._record.missing

    @property
    def result(self) -> dict[str, Any] | None:
        """The contents of `result.json`; None before the search is finished."""
        return self._record.result

    def trials(self) -> "pd.DataFrame":
        """Every measured assignment [T, 12], indexed by trial number.

        Columns: stage, name, kl and stderr (on search tokens), bpe, fits (the budget), seconds,
        predicted_kl (the sum of its groups' own), joint_kl (predicted with their interactions),
        is_stopped (lost its race, `kl` is an estimate), is_frontier, groups (name to choice).
        """
        return _frame(map(asdict, self._record.trials), _TRIAL_COLUMNS).set_index("number")

    def frontier(self) -> "pd.DataFrame":
        """The trials that no other beats in both BPE and KL, by BPE; columns as in `trials`."""
        trials = self.trials()
        return trials[trials["is_frontier"].astype(bool)].sort_values("bpe")

    def sensitivity(self) -> "pd.DataFrame":
        """Each (group, choice) alone, all else in BF16 [P, 4]: group, choice, kl, stderr.

        Means over the tokens measured so far where the probes are not finished, without stderr.
        """
        columns = ("group", "choice", "kl", "stderr")
        return _frame(map(asdict, self._record.probes), columns)

    def groups(self) -> "pd.DataFrame":
        """Layer groups [G, 6] by name: role, layer, elements, choice, bytes, is_open.

        The choice is the winner's, before the end that of the best assignment measured.
        """
        columns = ("name", "role", "layer", "elements", "choice", "bytes", "is_open")
        return _frame(map(asdict, self._record.groups), columns).set_index("name")

    def tasks(self) -> "pd.DataFrame":
        """What `autoquant evaluate` has measured on the run's assignments; empty without it.

        Columns: name (of the assignment), bpe, kl, task, items, digest (of the items), metric,
        value, stderr, to_bf16 (mean, low and high of the difference on the same items, or None).
        """
        columns = ("name", "bpe", "kl", "task", "items", "digest", "metric", "value", "stderr")
        found = self._record.evaluation
        return _frame([] if found is None else found.table(), (*columns, "to_bf16"))

    def baselines(self) -> "pd.DataFrame":
        """The winner and the fixed recipes by KL on the report split.

        Columns: name, bpe, kl, stderr, fits, search_kl, which is missing of a winner with refitted
        codes. Empty before the search is finished.
        """
        columns = ("name", "bpe", "kl", "stderr", "fits", "search_kl")
        result = self._record.result
        rows: list[dict[str, Any]] = []
        if result is not None:
            rows.append(
                {
                    "name": "the winner",
                    "bpe": result["bpe"]["checkpoint"],
                    "kl": result["kl"]["mean"],
                    "stderr": result["kl"]["stderr"],
                    "fits": True,
                    "search_kl": None
                    if self._record.is_polished
                    else result["winner"]["search_kl"],
                }
            )
            rows += [{name: row[name] for name in columns} for row in result["baselines"]]
        return _frame(rows, columns).sort_values("kl", ignore_index=True)

    def plot_frontier(self) -> "Figure":
        """KL against BPE: finalists with 95 % intervals, every trial, and the frontier."""
        return html.draw(self._record, "frontier")

    def plot_map(self) -> "Figure":
        """Format of each layer and role, and its sensitivity beside it."""
        return html.draw(self._record, "map")

    def plot_sensitivity(self) -> "Figure":
        """The most sensitive groups, coloured by the format they have."""
        return html.draw(self._record, "sensitivity")

    def plot_prediction(self) -> "Figure":
        """Measured KL against the sum of the groups' own."""
        return html.draw(self._record, "prediction")

    def plot_convergence(self) -> "Figure":
        """KL of each trial in order, and the best so far within the budget."""
        return html.draw(self._record, "convergence")

    def plot_tokens(self) -> "Figure":
        """How KL spreads over the tokens of the report split."""
        return html.draw(self._record, "tokens")

    def plot_coverage(self) -> "Figure":
        """Calibration tokens per expert of each layer."""
        return html.draw(self._record, "coverage")

    def plot_sizes(self) -> "Figure":
        """Bytes of the checkpoint by role and format."""
        return html.draw(self._record, "sizes")

    def write_report(self, path: Path | str | None = None) -> Path:
        """Write the HTML report, to `report.html` in the run directory by default.

        Raises:
            ConfigError: the file cannot be written.
        """
        return html.write_report(self._record, None if path is None else Path(path))


def load_run(path: Path | str) -> Run:
    """Read the run directory at `path`, finished or not; nothing is locked or changed.

    Raises:
        ConfigError: the folder is no run directory.
        SourceError: a file in it is damaged.
    """
    return Run(RunRecord.read(Path(path)))


def search(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    budget_bpe: float,
    budget_scope: Literal["checkpoint", "searched"] = "checkpoint",
    cost: Literal["bits", "active-bytes"] = "bits",
    cost_table: Path | str | None = None,
    cost_limit: float | None = None,
    space: str = "default",
    effort: Literal["fast", "default", "max"] = "default",
    a16_share: float = 0.0,
    target: Literal["blackwell", "hopper", "ampere"] | None = None,
    activation_mode: Literal["w4a4", "w4a16"] | None = None,
    probe: Literal["exact", "screened", "gradient"] = "screened",
    sensitivity: Path | str | None = None,
    kv_cache: KvCacheName = "bf16",
    trials: int = 30,
    sampler: str = "budget",
    trials_at_once: int = 1,
    workers: int = 1,
    max_seconds: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    calibration: str | None = None,
    calibration_tokens: int = 8_192,
    calibrate_all_experts: bool = False,
    input_headroom: float = 2.0,
    search_tokens: int = 16_384,
    report_tokens: int = 65_536,
    report_by: Literal["position"] | None = None,
    sequence_length: int | None = None,
    batch_tokens: int = 4_096,
    device: str | None = None,
    trust_remote_code: bool = False,
    weights: Literal["auto", "resident", "sharded", "host", "disk"] = "auto",
    device_memory: int | None = None,
    host_memory: int | None = None,
    mlflow: bool = True,
    study_storage: str | None = None,
    mlflow_experiment: str = "autoquant",
    mlflow_trials: Literal["all", "best", "none"] = "all",
    out: Path | str | None = None,
    resume: bool = True,
    export: bool = True,
    layout: Literal["modelopt", "compressed-tensors"] = "modelopt",
    observer: "Observer | None" = None,
) -> Run:
    """Search formats for every layer under a budget, and export the winner.

    The same as the command `autoquant search`, whose flags the arguments are named after. In a
    process group of `torch.distributed` every process calls it with the same arguments, and all
    share the work; each returns the run, whose folder has to be where each sees it.

    Args:
        model: folder or hub id; the bundled reference model by default.
        revision: branch, tag or commit of a model on the hub; its main branch by default.
        budget_bpe: most stored bits per element of the source model, scales included.
        budget_scope: what the budget counts: the whole checkpoint, or the layers left open.
        cost: what the budget limits: stored bits, or what one token reads.
        cost_table: YAML or CSV file of what each product costs in each choice: a second limit.
        cost_limit: most that the products may cost together, in the table's unit.
        space: which layers may take which formats: a shipped space's name, or a YAML file.
        effort: what a plain `nvfp4` or `fp8` of the space stands for, at the same bits: codes of
            the weight alone (fast), or besides these codes fitted to calibration inputs (default);
            max polishes the winner too.
        a16_share: most of the searched layers' multiply-adds that NVFP4 layers may do with inputs
            left in BF16, from 0 to 1.
        target: the machine that serves, hence which inputs it quantizes: those of NVFP4 and FP8
            layers (blackwell, the default), of FP8 layers (hopper), or none (ampere).
        activation_mode: an earlier name of `target`: w4a4 is blackwell, w4a16 hopper.
        kv_cache: how engines are to keep keys and values; fp8 calibrates and stores scales for
            them, and counts what it costs in KL.
        probe: how the KL of each group is found: measured in every choice (exact); measured in
            one choice and scaled to the others by gradients (screened); or by gradients alone.
        sensitivity: run directory whose probes are used: of `autoquant probe`, or of another
            search with the same settings; or `modelopt:FILE`, the scores that ModelOpt's
            `auto_quantize` saved.
        trials: whole assignments to measure, beyond the fixed recipes, the solver's optima and the
            check of their scale rules and roundings.
        sampler: who proposes the trials: `budget`, Optuna's `tpe`, `cmaes`, `nsgaii` or `random`,
            or `module:Class`, a subclass of `optuna.samplers.BaseSampler`.
        trials_at_once: trials of a round: each worker measures its share in one pass over the
            weights. They race against the best trial before them.
        workers: processes of this machine that measure different trials of a round, each with the
            whole model; at most `trials_at_once`. Results are the same.
        max_seconds: start no trial after so many seconds of loading, calibration, probes and
            trials, interrupted calls included. A finished result stays; `resume=False` sets it
            aside.
        max_tokens: start no trial after all trials together have used so many tokens. A finished
            result stays here too.
        seed: 0 or more; same seed, same result.
        calibration: file of text, JSONL or JSON, folder, or datasets id (`org/name:split`);
            `stdlib`, the source of Python's standard library, for the bundled model, and
            `mixture`, chat, prose, code and mathematics from the hub, for any other by default.
        calibration_tokens: tokens that input ranges are taken from.
        calibrate_all_experts: take input ranges from every expert on every token; KL is measured
            with the model's own routing either way.
        input_headroom: input scales hold so many times the largest calibration input, 1 or more;
            less where small blocks would suffer.
        search_tokens: tokens that probes and trials are measured on.
        report_tokens: tokens that the finalists are confirmed on.
        report_by: `position` also reports the KL by the position of tokens in their sequences.
        sequence_length: longest sequence, tokens; shorter if the model takes fewer. 256 for the
            bundled model and 2,048 for any other by default.
        batch_tokens: tokens of one forward.
        device: `cpu`, `cuda`, `cuda:1`; the first GPU by default, else the CPU.
        trust_remote_code: run code that comes with the model.
        weights: where weights are: on the device, on the GPUs of all processes of the machine
            together, in the host's memory or in the files, block by block; auto takes the first
            that fits. Results are the same.
        device_memory: most of the memory of the device to use, bytes.
        host_memory: most of the memory of the host to use, bytes.
        mlflow: record the search in MLflow.
        study_storage: URL of a storage of Optuna that every trial is added to as well.
        mlflow_experiment: experiment to record under.
        mlflow_trials: trials that get an MLflow run of their own.
        out: run directory; a folder of `runs/` by default.
        resume: go on with an earlier run of the same search; False sets it aside.
        export: write the winner as a checkpoint.
        layout: who reads it: vLLM, SGLang and TensorRT-LLM (modelopt), or vLLM, SGLang and
            transformers (compressed-tensors).
        observer: told of every stage and trial; the logger `autoquant` by default.

    Raises:
        ConfigError: a setting that cannot be meant.
        InfeasibleBudget: the budget is below the floor; nothing was read.
        SourceError: model or text missing, damaged or not understood.
        RunConflict: `out` holds another search, or another process holds it.
        RankLost: another process of the group has ended; the same call goes on.
    """
    settings = {name: value for name, value in locals().items() if name != "observer"}
    return _search(settings | {"budget_bpe": [budget_bpe]}, observer)[0]


def search_budgets(
    model: str | Path | None = None, *, budgets_bpe: Sequence[float], **settings: Any
) -> list[Run]:
    """Search under several budgets with one set of probes; one run for each, in their order.

    The same as the command `autoquant search --budget-bpe 4.8,5,5.5`.

    Args:
        model: folder or hub id; the bundled reference model by default.
        budgets_bpe: most stored bits per element, distinct; each gets a folder of `out`.
        settings: the other arguments of `search`; winners are exported with `export=True`.

    Raises:
        TypeError: `search` has no such argument.
        ConfigError, InfeasibleBudget, SourceError, RunConflict: as `search` does.
    """
    if "budget_bpe" in settings:
        raise TypeError("search_budgets() takes budgets_bpe, not budget_bpe")
    observer = settings.pop("observer", None)
    return _search(settings | {"model": model, "budget_bpe": [*budgets_bpe]}, observer)


def equalized_copy(model: str | Path | None = None, *, out: Path | str, **settings: Any) -> Path:
    """Write a copy of a model that computes the same, and loses less with 4-bit inputs.

    The same as the command `autoquant equalize`.

    Args:
        model: folder or hub id; the bundled reference model by default.
        out: a new folder for the copy.
        settings: `calibration`, `strength`, `parts`, and the arguments of `search` that say how a
            model is loaded and which tokens calibrate; `observer` watches.

    Returns:
        The folder.

    Raises:
        TypeError: there is no such argument.
        ConfigError: the model has no such channels, or the folder cannot be written.
        SourceError: model or text missing, or not understood.
        RunConflict: the folder holds something.
    """
    from autoquant.equalize.config import EqualizeConfig
    from autoquant.equalize.equalize import equalize
    from autoquant.run.observer import Logged

    observer = settings.pop("observer", None)
    config = EqualizeConfig.of(settings | {"model": model, "out": out})
    return equalize(config, observer or Logged()).path


def _search(settings: Mapping[str, Any], observer: "Observer | None") -> list[Run]:
    from autoquant.run.budgets import run_searches
    from autoquant.run.config import SearchConfig
    from autoquant.run.observer import Logged

    outcomes = run_searches(SearchConfig.of(settings), observer or Logged())
    return [load_run(outcome.path) for outcome in outcomes]


def _frame(rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(columns))
