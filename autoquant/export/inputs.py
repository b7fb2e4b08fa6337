"""The input ranges that an export stores scales of."""

from collections.abc import Iterable, Mapping

from autoquant.errors import SourceError
from autoquant.plan.assignment import Assignment
from autoquant.plan.linears import LayerGroup


def input_ranges(
    groups: Iterable[LayerGroup], assignment: Assignment, calibrated: Mapping[str, float]
) -> dict[str, float]:
    """Largest input magnitude of every input set that stores a scale.

    Args:
        groups: of the model.
        assignment: groups whose inputs stay in BF16 store no scale.
        calibrated: largest magnitudes; sets that no token reached have their layer's largest
            (`autoquant.model.inputs.fill_unseen`).

    Raises:
        SourceError: a magnitude is missing, NaN, infinite or negative.
    """
    used = dict.fromkeys(
        linear.input_scale_set
        for group in groups
        if not assignment[group.name].keeps_input
        for linear in group.linears
    )
    for name in used:
        amax = calibrated.get(name)
        if amax is None:
            raise SourceError(
                f"the input of {name} was not calibrated, and its layers store an input scale.",
                fix="calibrate the model under the same assignment.",
            )
        if not 0 <= amax < float("inf"):
            raise SourceError(
                f"calibration gave the input of {name} the largest magnitude {amax}.",
                fix="calibrate again on text that the model reads without overflow.",
            )
    return {name: calibrated[name] for name in used}
