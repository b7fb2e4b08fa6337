"""NVIDIA ModelOpt's `auto_quantize` with the same weights, tokens and formats.

ModelOpt has no NVFP4 on CPUs. Its quantizers take a registered backend, so both formats run through
AutoQuant's fused kernels with ModelOpt's own calibrated ranges, on any device: speed is compared
on equal kernels.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import autoquant_kernels as kernels
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.algorithms import (
    AutoQuantizeGradientSearcher,
    AutoQuantizeKLDivSearcher,
)
from modelopt.torch.quantization.nn import register_quant_backend
from torch.nn import functional
from transformers import AutoModelForCausalLM

from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.model.binding import Names, bind
from autoquant.plan.assignment import Assignment
from autoquant.search.problem import Problem
from experiments.common.bench import Bench

BACKEND = "autoquant"
SEARCHERS = {"gradient": AutoQuantizeGradientSearcher, "kl_div": AutoQuantizeKLDivSearcher}
_NUM_BITS = {(2, 1): NVFP4, (4, 3): FP8}
_TRIES = (1.005, 1.002, 1.001, 1.0, 0.9995, 0.999, 0.998, 0.995)
"""Targets, relative to the budget, that are tried in the peer's favour: its count leaves out the
scales of tensors, and its solvers are not monotone in the target."""


def _fake_quantize(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    amax = float(quantizer.amax)
    if quantizer.num_bits == (2, 1):
        return kernels.fake_quant_nvfp4(x, kernels.nvfp4_global_scale(amax))
    return kernels.fake_quant_fp8(x, kernels.fp8_scale(amax))


register_quant_backend(BACKEND, _fake_quantize)


def _format(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for entry in config["quant_cfg"]:
        if entry.get("cfg"):
            entry["cfg"]["backend"] = BACKEND
    return config


@dataclass
class Peer:
    """One method of `auto_quantize` after scoring; solved again for each budget without rescoring.

    Args:
        bench: the model that assignments are translated to, and the tokens.
        method: `gradient` or `kl_div`.
    """

    bench: Bench
    method: str
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.group_of = dict(_modules(self.bench))
        started = time.perf_counter()
        self.model, self.state = self._score()
        self.seconds["calibrate and score"] = time.perf_counter() - started

    def choices(self, problem: Problem) -> Iterator[Assignment]:
        """Yield distinct assignments that ModelOpt's solver picks for targets around the budget.

        Only those that keep the budget in bytes, counted as AutoQuant's are.
        """
        started = time.perf_counter()
        seen = set()
        for factor in _TRIES:
            bits = factor * self._bits_of(problem)
            try:
                config = mtq.get_auto_quantize_config(self.state, {"effective_bits": bits})
            except ValueError:
                continue
            assignment = problem.complete(self._formats(config))
            if problem.fits(assignment) and assignment.digest not in seen:
                seen.add(assignment.digest)
                yield assignment
        self.seconds["solve"] = time.perf_counter() - started

    def _score(self) -> tuple[Any, dict[str, Any]]:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self.bench.plan.source.path, dtype=torch.bfloat16
        )
        model.config.use_cache = False
        model.to(self.bench.device).eval()
        calibration, search = (self.bench.splits[n].batches for n in ("calibration", "search"))
        # One loader serves both passes; each stops after its number of batches.
        loader = _Loader(calibration, search)
        formats = [_format(mtq.NVFP4_DEFAULT_CFG), _format(mtq.FP8_DEFAULT_CFG)]
        with _timed(self.method, self.seconds, loader):
            return mtq.auto_quantize(
                model,
                constraints={"effective_bits": 8.0},
                quantization_formats=formats,
                data_loader=loader,
                forward_step=self._forward,
                loss_func=_loss,
                disabled_layers=list(self._disabled(model)),
                module_search_spaces=self._without_nvfp4(formats[1]),
                num_calib_steps=len(calibration),
                num_score_steps=len(search),
                method=self.method,
            )

    def _forward(self, model: Any, tokens: torch.Tensor) -> Any:
        output = model(input_ids=tokens.to(self.bench.device))
        return output.logits if self.method == "kl_div" else output

    def _disabled(self, model: Any) -> Iterator[str]:
        """Linears that AutoQuant keeps in BF16 too."""
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name not in self.group_of:
                yield name

    def _without_nvfp4(self, fp8: dict[str, Any]) -> list[dict[str, Any]]:
        choices = self.bench.plan.options.choices
        names = [
            name
            for name, group in self.group_of.items()
            if all(choice.format is not NVFP4.format for choice in choices[group])
        ]
        if not names:
            return []
        return [{"module_name_patterns": names, "quantization_formats": [fp8]}]

    def _bits_of(self, problem: Problem) -> float:
        """ModelOpt's effective bits of a selection that takes the whole budget."""
        open_elements = sum(group.elements for group in problem.groups)
        closed = float(self.state["cost_denominator"]) - open_elements
        bits = 8 * problem.knapsack.budget + 16 * closed
        return bits / float(self.state["cost_denominator"])

    def _formats(self, config: dict[str, Any]) -> dict[str, Choice]:
        """The choice of each open group, from ModelOpt's flat configuration."""
        found: dict[str, Choice] = {}
        for entry in config["quant_cfg"]:
            module, _, quantizer = entry["quantizer_name"].rpartition(".")
            group = self.group_of.get(module)
            if group is None or "weight_quantizer" not in quantizer or not entry.get("enable"):
                continue
            choice = _NUM_BITS[tuple(entry["cfg"]["num_bits"])]
            assert found.setdefault(group, choice) == choice, f"{group} is split"
        searched = self.bench.plan.accounting.searched
        return {name: found.get(name, BF16) for name in searched}


def _modules(bench: Bench) -> Iterator[tuple[str, str]]:
    """Yield (name in memory, group) of every module that holds weights of an open group."""
    model = bench.session.loaded.model
    names = {module: name for name, module in model.named_modules()}
    located = Names(model)
    for group in bench.session.quantized.groups:
        for slot in bind(located, group):
            yield names[slot.module], group.name


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
    searcher = SEARCHERS[method]
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


def _loss(output: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = output.logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device))
