"""What NVFP4 codes are worth at equal bits: every searched linear of a model in one choice.

    python -m experiments.codes.run MODEL --text TEXT [--unlike TEXT] --out RESULT.json

Codes are encoded once from the calibration tokens of TEXT, refitted ones (the polish) once for each
mode, and then scored with quantized inputs and without, on its report tokens and on those of a text
unlike it. KL in nats per token over the full vocabulary, standard errors over documents.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autoquant.codes.cache import CodeCache
from autoquant.codes.statistics import StatisticsStore
from autoquant.data.tokens import TokenPlan
from autoquant.formats import BF16, REFIT, Choice
from autoquant.measure.calibration import calibrate
from autoquant.measure.polish.visitor import polish
from autoquant.measure.session import Session, open_session
from autoquant.measure.statistics.moments import collect_moments
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.assignment import Assignment
from autoquant.plan.plan import Plan, make_plan
from autoquant.plan.space_file import load_space
from autoquant.run.observer import Logged
from autoquant.source.source import open_source
from experiments.common import record

CHOICES = (
    *("nvfp4/max", "nvfp4/mse", "nvfp4/four_over_six", "nvfp4/diagonal", "nvfp4/hessian"),
    *("nvfp4/max/gptq", "nvfp4/mse/gptq", "nvfp4/hessian/gptq", "nvfp4/diagonal/gptq"),
    *("nvfp4/mse/refit", "nvfp4/hessian/refit"),
)

MODES = (ActivationMode.W4A4, ActivationMode.W4A16)
"""Where the inputs of NVFP4 layers are quantized, and where they are not."""


def main() -> None:
    arguments = _arguments()
    plan = make_plan(open_source(arguments.model), load_space("default"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        study = Study(plan, arguments, Path(folder))
        study.prepare()
        rows += study.encoded([own for own in arguments.choices if not own.endswith(REFIT)])
        for text in filter(None, (arguments.text, arguments.unlike)):
            for mode in MODES:
                rows += study.scored(arguments.choices, text, mode)
    result = {"settings": record.settings(arguments), "rows": rows}
    record.write(arguments.out, result | record.provenance(arguments.commit))


class Study:
    """One model, with its codes and statistics in a folder that every session shares.

    Args:
        plan: of the model.
        arguments: of the command line.
        folder: for codes and statistics.
    """

    def __init__(self, plan: Plan, arguments: argparse.Namespace, folder: Path) -> None:
        self._plan, self._arguments = plan, arguments
        self._groups = [
            group for group in plan.groups if plan.options.choices[group.name] != (BF16,)
        ]
        self._statistics = StatisticsStore(folder / "statistics")
        self._codes = CodeCache(folder / "codes", made_from=plan.source.digest, most_bytes=1 << 40)
        self._first = self._open(arguments.text, ActivationMode.W4A4)

    def prepare(self) -> None:
        """Calibrate on the text that codes are fitted to."""
        split, scorer = self._first.splits["calibration"], self._first.scorer
        self._calibration = calibrate(scorer, split, lambda: None, headroom=2.0)
        started = time.monotonic()
        if self._arguments.alike:
            self._statistics.count_alike("not asked for")
        collect_moments(scorer, split, self._groups, self._statistics, lambda: None)
        self._seconds = time.monotonic() - started

    def encoded(self, choices: list[str]) -> Iterator[dict[str, Any]]:
        """Encode every group in each choice; seconds and linears with plain codes.

        All choices of a group follow each other, as in a search: the first with `gptq` factors the
        moments for all, and the first that needs moments reads them.
        """
        yield {"part": "statistics", "seconds": self._seconds}
        book, seconds = self._first.quantized.book, dict.fromkeys(choices, 0.0)
        for group in self._groups:
            for text in choices:
                started = time.monotonic()
                for unit in book.units(group):
                    book.unit(group, unit, Choice.parse(text))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[text] += time.monotonic() - started
        for text in choices:
            yield self._encoding(text, seconds[text])

    def _encoding(self, text: str, seconds: float, **others: Any) -> dict[str, Any]:
        book, choice = self._first.quantized.book, Choice.parse(text)
        plain = sum(len(book.plain(group, choice)) for group in self._groups)
        linears = sum(len(group.linears) for group in self._groups)
        row = {"part": "encode", "choice": text, "seconds": seconds} | others
        return _said(row | {"linears": linears, "plain": plain})

    def scored(
        self, choices: list[str], text: str, mode: ActivationMode
    ) -> Iterator[dict[str, Any]]:
        """KL of every choice on the report tokens of a text.

        Refitted codes are made for the mode, on the calibration tokens of the first text.
        """
        session = self._open(text, mode)
        session.quantized.set_input_scales(self._calibration.scales())
        split = session.splits["report"]
        for name in choices:
            choice = Choice.parse(name)
            assignment = Assignment.of({group.name: choice for group in self._groups})
            if choice.rounding == REFIT:
                session.quantized.use_polish(f"{mode} {name}")
                if text == self._arguments.text:
                    yield self._polish(session, assignment, name, mode)
            (scores,) = session.scorer.score_fully([assignment], split)
            row = {"part": "score", "choice": name, "mode": str(mode), "text": record.said(text)}
            yield _said(
                row | {"kl": scores.mean, "stderr": scores.stderr(), "tokens": split.tokens}
            )

    def _polish(
        self, session: Session, assignment: Assignment, name: str, mode: ActivationMode
    ) -> dict[str, Any]:
        started = time.monotonic()
        polish(session.scorer, session.splits["calibration"], assignment, lambda: None)
        seconds = time.monotonic() - started
        self._first.quantized.use_polish(f"{mode} {name}")
        return self._encoding(name, seconds, mode=str(mode))

    def _open(self, text: str, mode: ActivationMode) -> Session:
        arguments = self._arguments
        return open_session(
            self._plan.source,
            self._groups,
            calibration=text,
            tokens=TokenPlan(
                calibration=arguments.calibration_tokens,
                search=1,
                report=arguments.report_tokens,
                sequence_length=arguments.sequence_length,
                batch_tokens=arguments.batch_tokens,
                seed=arguments.seed,
            ),
            mode=mode,
            device=arguments.device,
            trust_remote_code=False,
            codes=self._codes,
            statistics=self._statistics,
            observer=Logged(),
        )


def _said(row: dict[str, Any]) -> dict[str, Any]:
    print(row, flush=True)
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="calibration and report tokens")
    parser.add_argument("--unlike", help="report tokens unlike them")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES))
    parser.add_argument("--alike", action="store_true", help="all rows count alike in moments")
    parser.add_argument("--calibration-tokens", type=int, default=49_152)
    parser.add_argument("--report-tokens", type=int, default=32_768)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--commit", help="of the code, where there is no repository")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
