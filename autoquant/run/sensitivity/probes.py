"""The probe stage: sensitivities by the method asked for, every finished record on disk at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from autoquant.data.tokens import Split
from autoquant.measure.compare import Ahead
from autoquant.measure.gradient import (
    BatchEstimate,
    NoGradient,
    ahead_of_gradients,
    gradient_probe,
    mean_estimate,
)
from autoquant.measure.interactions import Key, SketchBook
from autoquant.measure.method import ProbeMethod
from autoquant.measure.scorer import Scorer
from autoquant.measure.screen import (
    anchors,
    carried_over,
    measured_batches,
    negligible,
    scaled,
)
from autoquant.measure.sensitivity import BatchProbe, Sensitivity, probe
from autoquant.run.observer import Observer
from autoquant.store.run_directory import (
    GRADIENT_LOG,
    INTERACTIONS,
    NOISE,
    SENSITIVITY_LOG,
    RunDirectory,
)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """All probes of one run; gradient estimates and exact probes have a log each."""

    run: RunDirectory
    scorer: Scorer
    split: Split
    """The search tokens."""
    keys: tuple[Key, ...]
    seed: int
    observer: Observer

    def measure(self, method: ProbeMethod) -> tuple[Sensitivity, ProbeMethod]:
        """Sensitivities of all keys, and the method in the end.

        Where the model has no backward pass, every probe is exact, and a warning says so.
        """
        everywhere = range(len(self.split.batches))
        if method is ProbeMethod.EXACT:
            return self._exact(self.keys, everywhere), method
        try:
            estimates = self._estimates(with_noise=self._needs_noise(method))
        except NoGradient as reason:
            self.observer.warn(f"every probe is measured exactly, without gradients: {reason}.")
            return self._exact(self.keys, everywhere), ProbeMethod.EXACT
        estimate = mean_estimate(self.keys, self.split, estimates)
        if method is ProbeMethod.GRADIENT:
            return estimate, method
        return self._screened(estimates, estimate), method

    def ahead(self, method: ProbeMethod, beside: Split) -> Ahead | None:
        """What the gradients of batches that are not done need of the BF16 model, if it may go
        along in the pass over another split.
        """
        done = {record["batch"] for record in self.run.records(GRADIENT_LOG)}
        missing = [index for index in range(len(self.split.batches)) if index not in done]
        if method is ProbeMethod.EXACT or not missing:
            return None
        with_noise = self._needs_noise(method)
        return ahead_of_gradients(
            self.scorer, self.split, missing, with_noise=with_noise, beside=beside
        )

    def _needs_noise(self, method: ProbeMethod) -> bool:
        return method is ProbeMethod.SCREENED and self.run.read_json(NOISE) is None

    def _screened(self, estimates: Sequence[BatchEstimate], estimate: Sensitivity) -> Sensitivity:
        """One probe of each group, the rest by gradients; `estimate` is the mean of `estimates`."""
        anchor_of = anchors(self.keys, estimate)
        probed = self._worth_measuring(tuple(anchor_of.values()), estimate)
        batches = measured_batches(len(self.split.batches))
        exact = self._exact(probed, batches)
        measured = [e for e in estimates if e.batch in batches]
        beside = mean_estimate(self.keys, self.split, measured)
        return carried_over(scaled(self.keys, anchor_of, beside, exact), beside, estimate)

    def _worth_measuring(self, probes: tuple[Key, ...], estimate: Sensitivity) -> tuple[Key, ...]:
        floor = self._noise_floor()
        below = negligible(probes, estimate, floor)
        if below:
            self.observer.note(
                f"{len(below)} of {len(probes)} groups keep their gradients' estimates: together "
                f"they do less than two BF16 runs differ by, {floor:.1e} nats per token."
            )
        return tuple(key for key in probes if key not in below)

    def _noise_floor(self) -> float:
        """Mean KL between two BF16 runs of a batch, nats per token; measured once in a run."""
        stored = self.run.read_json(NOISE)
        if stored is None:
            stored = {"unit": "nats per token", "kl": self.scorer.noise(self.split).mean}
            self.run.write_json(NOISE, stored)
        return float(stored["kl"])

    def _estimates(self, *, with_noise: bool) -> list[BatchEstimate]:
        """Of every batch, perhaps with what the noise floor needs on the way."""
        done = [BatchEstimate.from_dict(record) for record in self.run.records(GRADIENT_LOG)]
        self.observer.stage("gradient", len(self.split.batches) - len(done))

        def keep(result: BatchEstimate) -> None:
            self.run.append(GRADIENT_LOG, result.to_dict())
            self.observer.step()

        return gradient_probe(
            self.scorer,
            self.split,
            self.keys,
            done,
            keep,
            seed=self.seed,
            with_noise=with_noise,
        )

    def _exact(self, keys: tuple[Key, ...], batches: Sequence[int]) -> Sensitivity:
        done = [BatchProbe.from_dict(record) for record in self.run.records(SENSITIVITY_LOG)]
        self.observer.stage("probe", len(keys) * len(batches) - len(done))

        def keep(result: BatchProbe) -> None:
            self.run.append(SENSITIVITY_LOG, result.to_dict())
            self.observer.step()

        tokens = max(batch.numel() for batch in self.split.batches)
        sketches = SketchBook(self.run.path / INTERACTIONS, keys, tokens)
        return probe(self.scorer, self.split, keys, done, keep, sketches, batches=batches)
