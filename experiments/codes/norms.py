"""What norms and one factor a matrix, tuned by KL, add to codes of a model without experts.

    python -m experiments.codes.norms MODEL --text TEXT --choice nvfp4/hessian/refit --out FILE

Every searched linear is in one choice. Its weights are what their codes decode to, its inputs are
rounded as a search rounds them, with the gradient of no rounding. Adam lowers KL(BF16 || quantized)
on the calibration tokens; KL on the report tokens of the same text is compared token by token.

Shapes: R sequences, L tokens, V vocabulary.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from autoquant.data.tokens import Split, TokenPlan
from autoquant.formats import REFIT, Choice
from autoquant.measure.polish.visitor import polish
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.budget import Scope
from experiments.common import record
from experiments.common.bench import Bench
from experiments.common.subjects import Subject

ROWS = 8
"""Sequences of a step."""


class Quantized(nn.Module):
    """A linear as the quantized model multiplies, times a factor."""

    def __init__(self, linear: nn.Linear, weight: torch.Tensor, inputs: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.inputs = weight, linear.bias, inputs
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.inputs is not None:
            rounded = self.inputs(x.detach().bfloat16()).float()
            x = x + (rounded - x).detach()
        return functional.linear(x, self.weight * self.factor, self.bias)


class Tuned:
    """A model and its quantized copy, both in float32."""

    def __init__(self, path: Path) -> None:
        self.teacher, self.student = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2)
        )
        self.student.requires_grad_(False)

    def quantize(self, bench: Bench, choice: Choice) -> None:
        """Put every searched linear into a choice."""
        names = {module: name for name, module in bench.session.loaded.model.named_modules()}
        book, scales = bench.session.quantized.book, bench.calibration.scales()
        for group, slot in bench.session.quantized.slots:
            units = {unit.name: unit for unit in book.units(group)}
            weight = book.unit(group, units[slot.name], choice.of_weight).decode().float()
            inputs = None
            if bench.mode.quantizes_input(choice):
                inputs = _rounding(choice, scales[slot.input_scale_set].amax)
            parent, _, own = names[slot.module].rpartition(".")
            module: Any = self.student.get_submodule(parent)
            setattr(module, own, Quantized(getattr(module, own), weight, inputs))

    def parameters(self, which: str) -> list[nn.Parameter]:
        """Norms, factors or both, ready to be tuned."""
        found = []
        for name, module in self.student.named_modules():
            if "norm" in name and which != "factors":
                found += list(module.parameters(recurse=False))
            if isinstance(module, Quantized) and which != "norms":
                found.append(module.factor)
        return [own.requires_grad_(True) for own in found]

    def kl(self, rows: torch.Tensor) -> torch.Tensor:
        """KL of every token [R, L], nats."""
        with torch.no_grad():
            wanted = functional.log_softmax(self.teacher(rows).logits, -1)
        found = functional.log_softmax(self.student(rows).logits, -1)
        return (wanted.exp() * (wanted - found)).sum(-1)

    @torch.no_grad()
    def mean_kl(self, rows: torch.Tensor) -> float:
        return float(torch.cat([self.kl(own).flatten() for own in rows.split(ROWS)]).mean())


def main() -> None:
    arguments = _arguments()
    choice, mode = Choice.parse(arguments.choice), ActivationMode(arguments.mode)
    subject = Subject(
        name=arguments.model.name,
        path=arguments.model,
        text=arguments.text,
        scope=Scope.SEARCHED,
        bpes=(),
    )
    tokens = TokenPlan(calibration=arguments.calibration_tokens, search=1, report=16_384)
    folder = arguments.out.with_suffix("")
    bench = Bench(subject, "default", tokens, mode=mode, folder=folder)
    _encode(bench, choice)
    model = Tuned(arguments.model)
    model.quantize(bench, choice)
    fitted, held_out = (_rows(bench.splits[name]) for name in ("calibration", "report"))
    before = model.mean_kl(held_out)
    started = time.monotonic()
    parameters = model.parameters(arguments.tune)
    for _ in _epochs(model, parameters, fitted, arguments):
        print(f"{model.mean_kl(held_out) / before:.4f} of the KL before", flush=True)
    for own in parameters:
        own.data = own.data.bfloat16().float() if own.ndim else own.data  # as they are stored
    result = {
        "settings": record.settings(arguments),
        "parameters": sum(own.numel() for own in parameters),
        "kl_before": before,
        "kl_after": model.mean_kl(held_out),
        "seconds": time.monotonic() - started,
    }
    record.write(arguments.out, result | record.provenance(None))
    print(result)


def _encode(bench: Bench, choice: Choice) -> None:
    if choice.rounding == REFIT:
        groups = bench.session.quantized.groups
        assignment = Assignment.of({group.name: choice for group in groups})
        bench.session.quantized.use_polish(str(bench.mode))
        polish(bench.session.scorer, bench.splits["calibration"], assignment, lambda: None)


def _epochs(
    model: Tuned, parameters: list[nn.Parameter], rows: torch.Tensor, arguments: argparse.Namespace
) -> Any:
    """Yield after each pass over the sequences; the rate falls to zero as a cosine."""
    torch.manual_seed(0)
    adam = torch.optim.Adam(parameters, lr=arguments.rate)
    steps = arguments.epochs * math.ceil(len(rows) / ROWS)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for epoch in range(arguments.epochs):
        for chosen in torch.randperm(len(rows)).split(ROWS):
            adam.zero_grad()
            model.kl(rows[chosen]).mean().backward()
            adam.step()
            rate.step()
        yield epoch


def _rounding(choice: Choice, amax: float) -> Any:
    scale = choice.format.input_scale(amax)
    return lambda x: choice.format.input(x, scale)


def _rows(split: Split) -> torch.Tensor:
    """The sequences of full length, [R, L]."""
    longest = max(batch.shape[1] for batch in split.batches)
    return torch.cat([batch for batch in split.batches if batch.shape[1] == longest])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--choice", default="nvfp4/hessian/refit")
    parser.add_argument("--mode", choices=["w4a4", "w4a16"], default="w4a4")
    parser.add_argument("--tune", choices=["both", "norms", "factors"], default="both")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
