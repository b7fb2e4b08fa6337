"""Numbers as readers expect them, and the verdict of a search in a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from autoquant.decimals import shortest
from autoquant.evaluate.scores import TaskRow
from autoquant.report.record import RunRecord
from autoquant.store.run_directory import IDENTITY, RESULT, Status

LISTED = 4
"""Names in one sentence."""


def size(count: float) -> str:
    """Bytes in the decimal unit of disks and of the hub."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def number(value: float | None, digits: int = 3) -> str:
    """`value` to significant digits, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def exact(value: float | None) -> str:
    """`value` with every digit that it has, or a dash where there is none."""
    return "-" if value is None else shortest(value)


def fixed(value: float | None, digits: int, sign: str = "") -> str:
    """`value` to decimal places, or a dash where there is none; `sign` is `+` to show it always."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def percent(value: float | None) -> str:
    """A share in per cent, or a dash where there is none."""
    return "-" if value is None else f"{value:.2%}"


def task_cells(row: TaskRow) -> tuple[str, str, str, str]:
    """A figure of a task: value, standard error, difference to the other and its interval."""
    paired = row.to_base
    own = (fixed(row.metric.value, 4), fixed(row.metric.stderr, 4))
    if paired is None:
        return (*own, "-", "-")
    low, high = fixed(paired.low, 4, sign="+"), fixed(paired.high, 4, sign="+")
    return (*own, fixed(paired.mean, 4, sign="+"), f"{low} to {high}")


def kl_range(mean: float, stderr: float | None) -> str:
    """Mean and standard error, nats per token."""
    return f"{mean:.5f}" if stderr is None else f"{mean:.5f} ± {stderr:.5f}"


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def verdict(record: RunRecord) -> str:
    """What the search found or how far it came, in a sentence or two."""
    return _unfinished(record) if record.result is None else finding(record.result)


def finding(result: Mapping[str, Any]) -> str:
    """What a finished search found, in a sentence or two; `result` is its `result.json`."""
    kl = result["kl"]
    rival = best_baseline(result)
    text = (
        f"{_size_and_budget(result)}, the chosen assignment is "
        f"{kl_range(kl['mean'], kl['stderr'])} nats per token away from BF16"
    )
    if rival is None:
        return f"{text}; no fixed recipe fits this budget."
    fitting = sum(row["fits"] for row in result["baselines"])
    which = "the best" if fitting > 1 else "the only"
    return f"{text}; {_against(kl['mean'], rival, which)}"


def budgeted(result: Mapping[str, Any]) -> float:
    """What the chosen assignment takes, in the unit of its budget."""
    return float(_budget(result)["taken"])


def unit_of_budget(result: Mapping[str, Any]) -> str:
    """What the budget counts: bits per element of a kind, of all or of a part of the layers."""
    return str(_budget(result)["unit"])


def counts_stored_bits(result: Mapping[str, Any]) -> bool:
    """Whether the budget counts what the whole checkpoint stores, as columns named BPE do.

    Args:
        result: or the signature of a search that has no result yet.
    """
    return bool(_budget(result)["is_bpe"])


def budget_note(result: Mapping[str, Any]) -> str:
    """Why BPE of a table and its column "in budget" do not go together; empty where they do."""
    if counts_stored_bits(result):
        return ""
    budget = _budget(result)
    meaning = f", {budget['meaning']}" if budget["meaning"] else ""
    return (
        f"BPE is of the whole checkpoint as stored; the budget of {exact(result['budget_bpe'])} "
        f"counts {budget['unit']}{meaning}."
    )


def further_limits(result: Mapping[str, Any]) -> list[str]:
    """Each limit besides the budget and what the chosen assignment takes of it, in words."""
    return [
        f"{exact(limit['asked'])} {limit['unit']} at most, of which it takes "
        f"{number(limit['taken'], 4)}"
        for limit in result.get("limits", [])[1:]
    ]


def fitted_codes(result: Mapping[str, Any]) -> str:
    """How many linears have codes fitted to inputs, and why others have none; empty without any."""
    fitted = result.get("fitted")
    if not fitted:
        return ""
    plain: Mapping[str, str] = fitted["plain"]
    gained = fitted["linears"] - len(plain)
    text = f"{gained} of {fitted['linears']} linears have codes fitted to inputs"
    names: dict[str, list[str]] = {}
    for name, reason in plain.items():
        names.setdefault(reason, []).append(name)
    reasons = [f"{len(own)} because {reason} ({_some(own)})" for reason, own in names.items()]
    return text + (f"; codes of the weight alone have {'; '.join(reasons)}" if reasons else "")


def polish(result: Mapping[str, Any]) -> str:
    """What the polish of the winner did, and which of the two is exported; empty without one."""
    found = result.get("polish")
    if not found:
        return ""
    gain, (polished, plain) = found["difference"], (found["polished"], found["plain"])
    text = (
        f"KL {kl_range(polished['kl'], polished['stderr'])} with refitted codes and "
        f"{kl_range(plain['kl'], plain['stderr'])} without: {fixed(gain['mean'], 5, sign='+')}"
    )
    if gain["low"] is not None:
        low, high = (fixed(gain[end], 5, sign="+") for end in ("low", "high"))
        text += f", 95 % interval from {low} to {high}"
    return f"{text}; the {found['exported']} assignment is exported"


def target_of(result: Mapping[str, Any]) -> str:
    """The machine that a result's KL is of; results without one name its inputs."""
    return str(result.get("target") or result["activation_mode"])


def clipped_inputs(result: Mapping[str, Any]) -> str:
    """How many input elements were beyond their scales on fresh text; empty where none is known."""
    inputs = result.get("inputs")
    if not inputs or not inputs["elements"]:
        return ""
    shares: Mapping[str, float] = inputs["groups"]
    headroom = f"scales hold {number(inputs['headroom'])} times the largest calibration input"
    if not shares:
        return f"none of {inputs['elements']:,} was beyond its scale; {headroom}"
    worst = max(shares, key=lambda name: shares[name])
    return (
        f"{inputs['clipped']:,} of {inputs['elements']:,} were beyond their scales, in "
        f"{len(shares)} groups, most in {worst} ({shares[worst]:.2g} of its own); {headroom}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])])


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """Each split that got less than nine tenths of the tokens asked for, in words."""
    return [
        f"{name}: {split['tokens']:,} tokens where {split['asked']:,} were asked for"
        for name, split in result["tokens"].items()
        if split["tokens"] < 0.9 * split.get("asked", 0)
    ]


def fit_terms(fit: Mapping[str, Any]) -> str:
    """What the fit to the trials adds up; `fit` is the entry `predictions` of a result."""
    share, strength = fit.get("share", 1.0), round(fit["strength"], 2)
    text = "the sum"
    if share == 0:
        text = "the sum of the gradients' estimates"
    elif share != 1:
        text = (
            f"the sum of the gradients' estimates and of {share:.2f} of what probes exceed them by"
        )
    if not strength:
        return text
    sign = "minus" if strength < 0 else "plus"
    return f"{text}, {sign} {abs(strength):.2f} times the interactions of all pairs of groups"


def how_probed(method: str) -> str:
    """How the KL of a group alone was found, by the `method` of `sensitivity.json`."""
    return {
        "exact": "measured with all else in BF16",
        "screened": (
            "all else in BF16: measured in one choice of each group on every second batch of "
            "tokens and scaled by gradients to the other choices and to all tokens; groups that "
            "together stay below the noise of BF16 have their gradients' estimates"
        ),
        "gradient": "all else in BF16: estimated by gradients, not measured",
        "modelopt": (
            "as ModelOpt scored it, scaled to what the cheapest formats of all groups were "
            "measured to do together"
        ),
    }[method]


def best_baseline(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline of least KL that keeps the budget."""
    fitting = [row for row in result["baselines"] if row["fits"]]
    return min(fitting, key=lambda row: float(row["kl"]), default=None)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where it is not defined."""
    import numpy as np

    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _budget(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first limit as `Limit.to_dict` describes it; signatures and old results tell it by words
    of their settings.
    """
    if "limits" in result:
        limit: Mapping[str, Any] = result["limits"][0]
        return limit
    is_active = result.get("cost", "bits") == "active-bytes"
    scope = result.get("budget_scope", "checkpoint")
    sizes = result.get("active", {}) if is_active else result
    kind = "active bits" if is_active else "bits"
    return {
        "unit": f"{kind} per element{' of the searched layers' if scope == 'searched' else ''}",
        "meaning": "those that one token reads" if is_active else "",
        "is_bpe": not is_active and scope == "checkpoint",
        "taken": sizes.get("bpe", {}).get(scope),
    }


def _size_and_budget(result: Mapping[str, Any]) -> str:
    """What the assignment takes of the budget, and beside it what the checkpoint stores."""
    stored, budget = size(result["checkpoint_bytes"]), f"budget {exact(result['budget_bpe'])}"
    taken = f"At {budgeted(result):.3f} {unit_of_budget(result)}"
    if counts_stored_bits(result):
        return f"{taken} ({stored}, {budget})"
    return f"{taken} ({budget}; the checkpoint stores {result['bpe']['checkpoint']:.3f}, {stored})"


def _against(mean: float, rival: dict[str, Any], which: str) -> str:
    share = 1 - mean / rival["kl"] if rival["kl"] else 0.0
    compared = f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"
    return (
        f"that is {compared} than {rival['name']}, {which} fixed recipe within the budget "
        f"({rival['kl']:.5f} at {rival['bpe']:.3f} bits)."
    )


def _unfinished(record: RunRecord) -> str:
    if RESULT in record.other_schema or IDENTITY in record.other_schema:
        version = record.identity["autoquant"]
        return (
            f"This search was recorded by another version of AutoQuant ({version}), in files that "
            f"this one reads in part."
        )
    how = {
        Status.RUNNING: "is still running, or was killed",
        Status.INTERRUPTED: "was interrupted",
        Status.FAILED: "failed",
        Status.FINISHED: "has lost its result",
    }[record.status]
    text = f"This search {how} before it was confirmed on fresh tokens"
    if record.best is None:
        return f"{text}; no assignment within the budget is measured yet."
    return (
        f"{text}. The best of {len(record.trials)} measured assignments has a KL of "
        f"{kl_range(record.best.kl, record.best.stderr)} nats per token at {record.best.bpe:.3f} "
        "bits per element, on the tokens that the search itself used."
    )
