"""`mtq.auto_quantize` with AutoQuant's search behind it: the same arguments and return values."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from autoquant.environment import modelopt
from autoquant.errors import ConfigError, RunConflict
from autoquant.formats import BF16
from autoquant.measure.calibration import read_calibration
from autoquant.measure.session import Session, make_session
from autoquant.model.loading import load_model
from autoquant.modelopt.batches import splits_of
from autoquant.modelopt.quantizers import set_quantizers
from autoquant.modelopt.space import Wishes, plan_of, searched_budget
from autoquant.modelopt.state import search_state
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan
from autoquant.progress import Unit
from autoquant.run.config import SearchConfig
from autoquant.run.measuring import book_of_run, code_cache, statistics_store
from autoquant.run.opening import limits_of
from autoquant.run.shared import Shared
from autoquant.run.signature import search_signature
from autoquant.run.stages import Search
from autoquant.search.problem import require_feasible
from autoquant.search.trials import Trial
from autoquant.source.source import Source, open_source
from autoquant.store.run_directory import ASSIGNMENT, CALIBRATION, RunDirectory

METHODS = {"gradient": "screened", "kl_div": "exact"}
"""How the sensitivities are found that stand for ModelOpt's two methods."""

MODEL, RUN = "model", "run"
"""In the folder `checkpoint`: the model in BF16, and the run directory of its search."""


def auto_quantize(
    model: Any,
    constraints: Mapping[str, Any] | None = None,
    quantization_formats: Sequence[Mapping[str, Any] | str] | None = None,
    data_loader: Iterable[Any] | None = None,
    forward_step: Callable[[Any, Any], Any] | None = None,
    loss_func: Callable[[Any, Any], torch.Tensor] | None = None,
    forward_backward_step: Callable[[Any, Any], Any] | None = None,
    disabled_layers: Sequence[str] | str | None = None,
    num_calib_steps: int = 512,
    num_score_steps: int = 128,
    verbose: bool = False,
    method: str = "gradient",
    checkpoint: Path | str | None = None,
    module_search_spaces: Sequence[Mapping[str, Any]] | None = None,
    fixed_quantization_config: Mapping[str, Any] | str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Choose a format for every linear of `model`, and put ModelOpt's quantizers on it.

    The arguments are those of `mtq.auto_quantize` of ModelOpt 0.47. The search measures whole
    assignments by KL(BF16 || quantized) on the loader's tokens and confirms the best on tokens that
    it has not seen. It works on a copy of the model, whose blocks are streamed from the host's
    memory or the disk where the device cannot hold them.

    Args:
        model: a transformers causal language model; it gets the quantizers.
        constraints: `effective_bits` of the weights of all linears, 4.8 by default.
        quantization_formats: presets of ModelOpt such as `NVFP4_DEFAULT_CFG`, by name or as
            configurations; NVFP4 in several scale rules, and FP8, by default.
        data_loader: read once: calibration begins at its first batch, so does the search, and
            twice `num_score_steps` batches leave it tokens of its own to confirm on.
        forward_step: calls the model with a batch; seen for the tokens alone.
        loss_func: taken for ModelOpt's sake and not called: KL needs no labels.
        forward_backward_step: takes the place of `forward_step` where that is not given.
        disabled_layers: globs over module names that stay in BF16, with all that must share their
            format.
        num_calib_steps: batches for input ranges.
        num_score_steps: batches to search on, and as many more to confirm on.
        verbose: print how the search gets on.
        method: `gradient` measures one KL of each group and scales gradients by it; `kl_div`
            measures every KL.
        checkpoint: a folder for the search: the same call goes on in it, or gives its result again.
        module_search_spaces: as ModelOpt takes them.
        fixed_quantization_config: a format for all that `module_search_spaces` does not name.

    Returns:
        The model, and a state like ModelOpt's: `mtq.get_auto_quantize_config` takes it. Scores are
        nats per token. Its key `autoquant` holds the contents of `result.json`, and `run`, the run
        directory, where `checkpoint` keeps one.

    Raises:
        ConfigError: an argument that cannot be meant, or ModelOpt is not installed.
        InfeasibleBudget: the formats do not fit `effective_bits`.
        SourceError: a model that is not understood.
        RunConflict: `checkpoint` holds another search.
    """
    modelopt("torch.quantization")
    if method not in METHODS:
        raise ConfigError(
            f"method is {method!r}.", fix=f"write one of {', '.join(map(repr, METHODS))}."
        )
    step = forward_step or forward_backward_step
    if data_loader is None or step is None:
        raise ConfigError(
            "auto_quantize needs data_loader and forward_step.",
            fix="pass both, as mtq.auto_quantize takes them.",
        )
    wishes = Wishes.of(
        constraints,
        quantization_formats,
        disabled_layers,
        module_search_spaces,
        fixed_quantization_config,
    )
    splits = splits_of(
        model, data_loader, step, calibration=num_calib_steps, scored=num_score_steps
    )
    with ExitStack() as stack:
        folder = (
            Path(checkpoint)
            if checkpoint is not None
            else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        )
        source = _stored(model, folder)
        plan, modules = plan_of(source, model, wishes)
        config = SearchConfig.of(
            {
                "model": str(source.path),
                "budget_bpe": [searched_budget(plan, model, modules, wishes)],
                "budget_scope": "searched",
                "space": plan.space.name,
                "probe": METHODS[method],
                "calibration": "data_loader",
                "calibration_tokens": max(32, splits["calibration"].tokens),
                "search_tokens": max(32, splits["search"].tokens),
                "report_tokens": max(32, splits["report"].tokens),
                "mlflow": False,
                "export": False,
                "out": folder / RUN,
            }
        )
        limits = limits_of(config, plan)
        require_feasible(plan.accounting, limits)
        watcher = _Watcher(verbose)
        with RunDirectory.open(
            folder / RUN, search_signature(config, plan), resume=True
        ) as directory:
            session = make_session(
                load_model(source.path, model.device, tokenizer=_Numbers()),
                splits,
                [g for g in plan.groups if plan.options.choices[g.name] != (BF16,)],
                mode=config.mode,
                codes=code_cache(source, directory.path),
                statistics=statistics_store(directory.path),
                observer=watcher,
            )
            result = Search(
                config=config,
                plan=plan,
                limits=limits,
                run=directory,
                observer=watcher,
                shared=Shared(session=session),
                command="autoquant.modelopt.auto_quantize(...)",
            ).execute()
        return _applied(model, plan, folder / RUN, session), search_state(
            plan,
            folder / RUN,
            modules=modules,
            wishes=wishes,
            method=method,
            result=result | ({"run": str(folder / RUN)} if checkpoint is not None else {}),
        )


def _applied(model: Any, plan: Plan, run: Path, session: Session) -> Any:
    """The model with the winner's quantizers."""
    assignment = Assignment.read(run / ASSIGNMENT)
    quantized = [group for group in plan.groups if assignment[group.name] != BF16]
    return set_quantizers(
        model,
        plan.groups,
        assignment,
        read_calibration(run / CALIBRATION, quantized, ()),
        book_of_run(plan.source, run),
    )


def _stored(model: Any, folder: Path) -> Source:
    """The model as a checkpoint in BF16 in `folder`, the same for the same weights.

    Raises:
        RunConflict: `folder` holds another model.
    """
    target = folder / MODEL
    if not target.exists():
        save_bf16(model, target)
        return open_source(target)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        save_bf16(model, Path(temporary))
        if open_source(Path(temporary)).digest != open_source(target).digest:
            raise RunConflict(
                f"{folder} holds the search of another model.",
                fix="pass another folder as `checkpoint`.",
            )
    return open_source(target)


def save_bf16(model: Any, folder: Path) -> None:
    """Save a model with its weights in BF16; what it keeps in another type stays in that."""
    state = model.state_dict()
    narrowed = {name: t.to(torch.bfloat16) for name, t in state.items() if t.dtype == model.dtype}
    before = dict(model.config.__dict__)
    try:
        model.save_pretrained(folder, state_dict=state | narrowed)
    finally:
        model.config.__dict__.update(before)  # transformers writes the dtype into it, as a text


class _Numbers:
    """Decodes tokens where no tokenizer is known."""

    def decode(self, tokens: Any) -> str:
        """The tokens' numbers."""
        return " ".join(map(str, tokens if isinstance(tokens, Iterable) else [tokens])) + " "


class _Watcher:
    """Prints how a search gets on if it is asked to; warnings are Python's."""

    def __init__(self, verbose: bool) -> None:
        self._say: Callable[[str], None] = print if verbose else lambda text: None

    def stage(self, name: str, steps: int, unit: Unit = Unit.STEPS) -> None:
        """A stage begins."""
        self._say(f"AutoQuant: {name}")

    def step(self, count: int = 1) -> None:
        """Do nothing."""

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A candidate was measured."""
        self._say(f"AutoQuant: trial {trial.number}, {trial.name}: KL {trial.kl:.5f} nats a token")

    def note(self, message: str) -> None:
        """Say it."""
        self._say(f"AutoQuant: {message}")

    def warn(self, message: str) -> None:
        """Warn of it."""
        warnings.warn(message, stacklevel=2)
