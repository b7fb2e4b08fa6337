"""ModelOpt's own `auto_quantize` on the weights, tokens and formats of a search.

ModelOpt has no NVFP4 on CPUs. Its quantizers take a registered backend, so both formats run through
AutoQuant's fused kernels with ModelOpt's own calibrated ranges, on any device: speed is compared
on equal kernels. For the same reason a preset that fits NVFP4 weights otherwise than by their
largest magnitude gets the codes of the choice that stands for it.
"""

import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from autoquant.environment import modelopt
from autoquant.errors import ConfigError
from autoquant.export.layouts.presets import presets
from autoquant.formats import BF16, Choice, Format
from autoquant.measure.session import Session
from autoquant.modelopt.stored_weights import StoredWeights
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan
from autoquant.search.problem import Problem

BACKEND = "autoquant"
METHODS = ("gradient", "kl_div")

_NAMES = ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG")
_TRIES = (1.005, 1.002, 1.001, 1.0, 0.9995, 0.999, 0.998, 0.995)
"""Targets, relative to the budget, that are tried in the peer's favour: its count leaves out the
scales of tensors, and its solvers are not monotone in the target."""


@dataclass
class Peer:
    """One method of `auto_quantize` after scoring; solved again for each budget without rescoring.

    Args:
        plan: what is open; scale rules aside, which ModelOpt's default formats have not.
        session: the model that assignments are translated to, and the tokens.
        method: `gradient` or `kl_div`.
        codes: of weights in the first preset's format, for its scoring and in its assignments.

    Raises:
        ConfigError: ModelOpt is not installed, or the plan opens neither of its formats.
    """

    plan: Plan
    session: Session
    method: str
    codes: Choice = field(default_factory=lambda: presets()[_NAMES[0]])
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.group_of = dict(_modules(self.session))
        started = time.perf_counter()
        self.model, self.state = self._score()
        self.seconds["calibrate and score"] = time.perf_counter() - started

    def choices(self, problem: Problem) -> Iterator[Assignment]:
        """Yield distinct assignments that ModelOpt's solver picks for targets around the budget.

        Only those that keep the budget in bytes, counted as AutoQuant's are.
        """
        mtq = modelopt("torch.quantization")
        started = time.perf_counter()
        seen = set()
        for factor in _TRIES:
            bits = factor * self._bits_of(problem)
            try:
                with _silent():
                    config = mtq.get_auto_quantize_config(self.state, {"effective_bits": bits})
            except ValueError:
                continue
            assignment = problem.complete(self._formats(config))
            if problem.fits(assignment) and assignment.digest not in seen:
                seen.add(assignment.digest)
                yield assignment
        self.seconds["solve"] = time.perf_counter() - started

    def _score(self) -> tuple[Any, dict[str, Any]]:
        from transformers import AutoModelForCausalLM

        mtq = modelopt("torch.quantization")
        _register_backend(BACKEND, fake_quantize)
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.plan.source.path, dtype=torch.bfloat16
        )
        model.config.use_cache = False
        model.to(self.session.loaded.device).eval()
        if self.codes != _plain():
            own = {g: self.codes for g in self._groups() if self._may_take(self.codes.format, g)}
            _register_backend(self._backend, StoredWeights(model, self.session, own))
        calibration, search = (self.session.splits[n].batches for n in ("calibration", "search"))
        # One loader serves both passes; each stops after its number of batches.
        loader = _Loader(calibration, search)
        with _timed(self.method, self.seconds, loader), _silent():
            return mtq.auto_quantize(  # type: ignore[no-any-return]
                model,
                constraints={"effective_bits": 8.0},
                quantization_formats=[self._configuration(name) for name in self._open_presets()],
                data_loader=loader,
                forward_step=self._forward,
                loss_func=_loss,
                disabled_layers=list(self._disabled(model)),
                module_search_spaces=self._narrower(),
                num_calib_steps=len(calibration),
                num_score_steps=len(search),
                method=self.method,
            )

    def _forward(self, model: Any, tokens: torch.Tensor) -> Any:
        output = model(input_ids=tokens.to(self.session.loaded.device))
        return output.logits if self.method == "kl_div" else output

    def _open_presets(self) -> list[str]:
        """The presets whose format some group may take."""
        found = [
            name
            for name in _NAMES
            if any(self._may_take(presets()[name].format, g) for g in self._groups())
        ]
        if not found:
            raise ConfigError(
                f"the search space opens no format of {' and '.join(_NAMES)}.",
                fix="compare runs whose space opens one of them.",
            )
        return found

    def _groups(self) -> set[str]:
        return set(self.group_of.values())

    def _may_take(self, format: Format, group: str) -> bool:
        return any(choice.format == format for choice in self.plan.options.choices[group])

    def _disabled(self, model: Any) -> Iterator[str]:
        """Linears that AutoQuant keeps in BF16 too."""
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in self.group_of:
                yield name

    def _narrower(self) -> list[dict[str, Any]]:
        """The formats of groups that may not take every one."""
        every = tuple(self._open_presets())
        modules: dict[tuple[str, ...], list[str]] = {}
        for module, group in self.group_of.items():
            own = tuple(name for name in every if self._may_take(presets()[name].format, group))
            if own != every:
                modules.setdefault(own, []).append(module)
        return [
            {
                "module_name_patterns": names,
                "quantization_formats": [self._configuration(name) for name in own],
            }
            for own, names in modules.items()
            if own
        ]

    def _choice(self, name: str) -> Choice:
        choice = presets()[name]
        return self.codes if choice.format == self.codes.format else choice

    @property
    def _backend(self) -> str:
        return f"{BACKEND} {self.codes}"

    def _configuration(self, name: str) -> dict[str, Any]:
        """A preset on our kernels, with inputs quantized as the serving machine does."""
        choice, config = self._choice(name), copy.deepcopy(_preset(name))
        for entry in config["quant_cfg"]:
            if not entry.get("cfg"):
                continue
            is_weight = entry["quantizer_name"].endswith("weight_quantizer")
            fitted = is_weight and choice == self.codes != _plain()
            entry["cfg"]["backend"] = self._backend if fitted else BACKEND
            if not is_weight and not self.session.quantized.mode.quantizes_input(choice):
                entry["enable"] = False
        return config

    def _bits_of(self, problem: Problem) -> float:
        """ModelOpt's effective bits of a selection that takes the whole budget."""
        open_elements = sum(group.elements for group in problem.groups)
        closed = float(self.state["cost_denominator"]) - open_elements
        bits = 8 * problem.knapsack.budget + 16 * closed
        return bits / float(self.state["cost_denominator"])

    def _formats(self, config: dict[str, Any]) -> dict[str, Choice]:
        """The choice of each open group, from ModelOpt's flat configuration."""
        by_bits = {_num_bits(name): self._choice(name) for name in _NAMES}
        found: dict[str, Choice] = {}
        for entry in config["quant_cfg"]:
            module, _, quantizer = entry["quantizer_name"].rpartition(".")
            group = self.group_of.get(module)
            if group is None or "weight_quantizer" not in quantizer or not entry.get("enable"):
                continue
            choice = by_bits[tuple(entry["cfg"]["num_bits"])]
            assert found.setdefault(group, choice) == choice, f"{group} is split"
        searched = self.plan.accounting.searched
        return {name: found.get(name, BF16) for name in searched}


def _plain() -> Choice:
    """What the first preset says, whose weights the kernels round by ModelOpt's own ranges."""
    return presets()[_NAMES[0]]


def _preset(name: str) -> dict[str, Any]:
    config: dict[str, Any] = getattr(modelopt("torch.quantization"), name)
    return config


def _num_bits(name: str) -> tuple[int, ...]:
    entry = next(entry for entry in _preset(name)["quant_cfg"] if entry.get("cfg"))
    return tuple(entry["cfg"]["num_bits"])


def _register_backend(name: str, backend: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    """Let quantizers of the backend round as it does."""
    with _silent():  # it tells when a name is taken again
        modelopt("torch.quantization.nn").register_quant_backend(name, backend)


def fake_quantize(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """`x` as a quantizer of ModelOpt with these bits and this range rounds it."""
    amax = float(quantizer.amax)
    for name in _NAMES:
        if tuple(quantizer.num_bits) == _num_bits(name):
            format = presets()[name].format
            return format.input(x, format.input_scale(amax))
    raise AssertionError(quantizer.num_bits)


def _modules(session: Session) -> Iterator[tuple[str, str]]:
    """Yield (name in memory, group) of every module that holds weights of an open group."""
    names = {module: name for name, module in session.loaded.model.named_modules()}
    for group, module in session.quantized.modules():
        yield names[module], group


class _Loader:
    """Calibration batches until scoring begins, then search batches."""

    def __init__(self, calibration: Any, search: Any) -> None:
        self.batches, self.search = calibration, search

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@contextmanager
def _timed(method: str, seconds: dict[str, float], loader: _Loader) -> Iterator[None]:
    """Time the scoring alone, and hand it the search tokens."""
    algorithms = modelopt("torch.quantization.algorithms")
    searcher = {
        "gradient": algorithms.AutoQuantizeGradientSearcher,
        "kl_div": algorithms.AutoQuantizeKLDivSearcher,
    }[method]
    original = searcher.estimate_sensitivity_scores

    def estimate(self: Any) -> None:
        loader.batches = loader.search
        started = time.perf_counter()
        original(self)
        seconds["score"] = time.perf_counter() - started

    searcher.estimate_sensitivity_scores = estimate
    try:
        yield
    finally:
        searcher.estimate_sensitivity_scores = original


@contextmanager
def _silent() -> Iterator[None]:
    """Without what ModelOpt prints of its progress, which would be part of a command's result."""
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _loss(output: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = output.logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device))
