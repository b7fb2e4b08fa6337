"""What makes two searches the same: the signatures of run directories, and their names."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoquant.decimals import shortest
from autoquant.errors import SourceError
from autoquant.export.layouts.base import Layout
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.model_costs import CostKind
from autoquant.plan.plan import Plan
from autoquant.run.config import ProbeConfig, SearchConfig
from autoquant.search.samplers import OWN_SAMPLER

NUMERICS_VERSION = 6
"""Raised when a search would measure or predict something else than before under the same settings:
its stored probes and trials then mean something else too."""

FINALISTS = 2
"""Candidates that are measured again on the report split, besides the solver's optimum."""

_AFTER_PROBES = {
    "budget_bpe",
    "budget_scope",
    "cost",
    "cost_table",
    "cost_limit",
    "a16_share",
    "trials",
    "sampler",
    "trials_at_once",
    "max_tokens",
    "layout",
    "report_by",
    "polish",
    "finalists",
}
"""Parts of a signature that only later stages depend on."""


def search_signature(config: SearchConfig, plan: Plan) -> dict[str, Any]:
    """What makes a search under one budget the same as another, as JSON values.

    Time limits and the device are left out: they do not change what is being looked for. What came
    after the first version is in it where it is not the default, so that earlier runs go on.
    """
    probes = probe_signature(config, plan)
    state = config.modelopt_state
    return {
        **probes,
        **({"probe": _digest_of_state(state)} if state is not None else {}),
        "tokens": {**probes["tokens"], "report": config.report_tokens},
        "budget_bpe": config.budget.bpe,
        "budget_scope": str(config.budget.scope),
        **({"cost": str(config.cost)} if config.cost is not CostKind.BITS else {}),
        **_table_part(config),
        **({"a16_share": config.a16_share} if config.a16_share else {}),
        "trials": config.trials,
        **({"sampler": config.sampler} if config.sampler != OWN_SAMPLER else {}),
        **({"trials_at_once": config.trials_at_once} if config.trials_at_once > 1 else {}),
        **({"max_tokens": config.max_tokens} if config.max_tokens is not None else {}),
        **({"layout": str(config.layout)} if config.layout is not Layout.MODELOPT else {}),
        **({"report_by": config.report_by} if config.report_by is not None else {}),
        **({"polish": True} if config.effort.polishes else {}),
        "finalists": FINALISTS,
    }


def probe_signature(config: ProbeConfig, plan: Plan) -> dict[str, Any]:
    """What makes calibration and probes the same as another's, as JSON values."""
    return {
        "model": plan.source.digest,
        "space": plan.space.name,
        "shared_experts": plan.space.shared_experts,
        "rules": [
            {"match": list(rule.match), "choices": [str(choice) for choice in rule.choices]}
            for rule in plan.space.rules
        ],
        **({"casts": True} if any(group.casts_to for group in plan.groups) else {}),
        "calibration": config.text,
        "tokens": {
            "calibration": config.calibration_tokens,
            "search": config.search_tokens,
            "sequence_length": config.longest,
            "batch_tokens": config.batch_tokens,
            **({"all_experts": True} if config.calibrate_all_experts else {}),
        },
        **({"input_headroom": config.input_headroom} if config.input_headroom != 1.0 else {}),
        "activation_mode": str(config.mode),
        **({"kv_cache": str(config.kv_cache)} if config.kv_cache is not KvCache.BF16 else {}),
        "probe": str(config.probe),
        "seed": config.seed,
        "numerics": NUMERICS_VERSION,
    }


def probe_part(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Of the signature of a search or of probes: what decides calibration and probes."""
    kept = {name: value for name, value in signature.items() if name not in _AFTER_PROBES}
    tokens = {name: count for name, count in signature["tokens"].items() if name != "report"}
    return {**kept, "tokens": tokens}


def search_name(config: SearchConfig, plan: Plan) -> str:
    """A folder name for the run: model, budget and the head of the signature's digest."""
    return _name(plan, budget_name(config), search_signature(config, plan))


def probe_name(config: ProbeConfig, plan: Plan) -> str:
    """A folder name for the probes alone."""
    return _name(plan, "probes", probe_signature(config, plan))


def budget_name(config: SearchConfig) -> str:
    """A folder name for the run under its budget, among those of other budgets."""
    return f"{shortest(config.budget.bpe)}bpe"


def _name(plan: Plan, what: str, signature: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()
    model = Path(plan.source.model).name.strip(".") or "model"
    return f"{model}-{what}-{digest[:8]}"


def _digest_of_state(file: Path) -> str:
    try:
        return f"modelopt:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    except OSError as error:
        raise SourceError(
            f"the state of ModelOpt's auto_quantize, {file}, cannot be read: {error.strerror}.",
            fix="pass the file that its argument `checkpoint` named.",
        ) from error


def _table_part(config: SearchConfig) -> dict[str, Any]:
    """The content of a cost table and its limit; nothing without one."""
    if config.cost_table is None:
        return {}
    content = hashlib.sha256(config.cost_table.read_bytes()).hexdigest()
    return {"cost_table": f"sha256:{content}", "cost_limit": config.cost_limit}
