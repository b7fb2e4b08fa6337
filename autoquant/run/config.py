"""Everything that decides a search's outcome, and what makes two searches the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoquant.data.text import STDLIB
from autoquant.data.tokens import TokenPlan
from autoquant.export.layouts.base import Layout
from autoquant.measure.method import ProbeMethod
from autoquant.model.inputs import ActivationMode
from autoquant.plan.budget import Budget
from autoquant.plan.kv_cache import KvCache
from autoquant.plan.limit import Limit
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import Plan
from autoquant.plan.space import SearchSpace
from autoquant.source.source import Source

NUMERICS_VERSION = 3
"""Raised when a search would measure or predict something else than before under the same settings:
its stored probes and trials then mean something else too."""

_AFTER_PROBES = {
    "budget_bpe",
    "budget_scope",
    "cost",
    "trials",
    "reweight_trials",
    "max_tokens",
    "layout",
    "finalists",
}
"""Parts of a signature that only later stages depend on."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search."""

    source: Source
    space: SearchSpace
    budget: Budget
    cost: CostKind = CostKind.BITS
    """What the budget limits."""
    calibration: str = STDLIB
    """Text source, as `load_corpus` takes it."""
    tokens: TokenPlan = field(default_factory=TokenPlan)
    mode: ActivationMode = ActivationMode.W4A4
    probe: ProbeMethod = ProbeMethod.SCREENED
    trials: int = 30
    """Joint measurements beyond the baselines, the solver's optima and the check of their rules."""
    reweight_trials: int = 0
    """How many of them Optuna proposes."""
    max_seconds: float | None = None
    """Seconds of loading, calibration, probes and trials, those of earlier processes included,
    after which no further trial begins."""
    max_tokens: int | None = None
    """Tokens of all trials together after which no further trial begins."""
    finalists: int = 2
    """Candidates that are measured again on the report split, besides the solver's optimum."""
    seed: int = 0
    device: str | None = None
    trust_remote_code: bool = False
    export: bool = True
    """Whether to write the winner as a checkpoint."""
    layout: Layout = Layout.MODELOPT
    """Of the checkpoint."""
    kv_cache: KvCache = KvCache.BF16
    """What mixes are measured and exported with."""

    def limits(self, plan: Plan) -> tuple[Limit, ...]:
        """What every assignment of the search keeps."""
        return (plan.limit(self.budget, self.cost),)

    def signature(self) -> dict[str, Any]:
        """What makes a search the same as another, as JSON values.

        Time limits and the device are left out: they do not change what is being looked for.
        """
        return {
            "model": self.source.digest,
            "space": self.space.name,
            "shared_experts": self.space.shared_experts,
            "rules": [
                {"match": list(rule.match), "choices": [str(choice) for choice in rule.choices]}
                for rule in self.space.rules
            ],
            "budget_bpe": self.budget.bpe,
            "budget_scope": str(self.budget.scope),
            **({"cost": str(self.cost)} if self.cost is not CostKind.BITS else {}),
            "calibration": self.calibration,
            "tokens": {
                "calibration": self.tokens.calibration,
                "search": self.tokens.search,
                "report": self.tokens.report,
                "sequence_length": self.tokens.sequence_length,
                "batch_tokens": self.tokens.batch_tokens,
                **({"all_experts": True} if self.tokens.all_experts else {}),
            },
            "activation_mode": str(self.mode),
            "trials": self.trials,
            **({"reweight_trials": self.reweight_trials} if self.reweight_trials else {}),
            **({"max_tokens": self.max_tokens} if self.max_tokens is not None else {}),
            **({"layout": str(self.layout)} if self.layout is not Layout.MODELOPT else {}),
            **({"kv_cache": str(self.kv_cache)} if self.kv_cache is not KvCache.BF16 else {}),
            "probe": str(self.probe),
            "finalists": self.finalists,
            "seed": self.seed,
            "numerics": NUMERICS_VERSION,
        }

    def run_name(self) -> str:
        """A folder name for the run: model, budget and the head of the signature's digest."""
        return self._name(f"{self.budget.bpe:g}bpe", self.signature())

    def probe_signature(self) -> dict[str, Any]:
        """What makes calibration and probes the same as another search's, as JSON values."""
        return probe_part(self.signature())

    def probe_name(self) -> str:
        """A folder name for the probes alone."""
        return self._name("probes", self.probe_signature())

    def _name(self, what: str, signature: Mapping[str, Any]) -> str:
        import hashlib
        import json

        digest = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()
        model = Path(self.source.model).name.strip(".") or "model"
        return f"{model}-{what}-{digest[:8]}"


def probe_part(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Of the signature of a search or of probes: what decides calibration and probes."""
    kept = {name: value for name, value in signature.items() if name not in _AFTER_PROBES}
    tokens = {name: count for name, count in signature["tokens"].items() if name != "report"}
    return {**kept, "tokens": tokens}
