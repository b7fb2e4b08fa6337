"""Where forwards of the same tokens begin to differ."""

from collections.abc import Sequence

from autoquant.forward.flow import Flow
from autoquant.forward.trunk import Part, Trunk
from autoquant.model.live import QuantizedModel
from autoquant.plan.assignment import Assignment


class Differences:
    """The stages of a model in which its layer groups come in.

    Args:
        trunk: the model.
        quantized: its groups.
    """

    def __init__(self, trunk: Trunk, quantized: QuantizedModel) -> None:
        self._trunk = trunk
        self._layers = _first_layers(trunk, quantized)

    def first_stage(self, group: str) -> int:
        """The first stage in which a group's choice matters."""
        return self._trunk.stage_of(self._layers[group])

    def between(self, flow: Flow, assignment: Assignment) -> int:
        """First stage in which an assignment differs from a forward's."""
        differing = [
            self._trunk.stage_of(layer)
            for group, layer in self._layers.items()
            if flow.assignment[group] != assignment[group]
        ]
        return min(differing, default=self._trunk.stages)

    def forwards(
        self,
        parts: tuple[Part, ...],
        assignments: Sequence[Assignment],
        before: Flow | None,
        *,
        keep: bool,
        counted: bool,
    ) -> list[Flow]:
        """Forwards of a batch, each from where it leaves another or one before them.

        Args:
            parts: of the batch.
            assignments: one of each forward.
            before: a forward that has been there, with its states.
            keep: whether they keep theirs.
            counted: whether what they clip of their inputs is counted.
        """
        flows: list[Flow] = []
        for assignment in assignments:
            known = flows if before is None else [before, *flows]
            start, after = max(
                ((self.between(flow, assignment), flow) for flow in known),
                key=lambda found: found[0],
                default=(0, None),
            )
            flows.append(
                Flow(
                    parts=parts,
                    assignment=assignment,
                    with_cache=True,
                    start=start,
                    after=after if start else None,
                    keep=keep,
                    clips={} if counted else None,
                )
            )
        return flows


def _first_layers(trunk: Trunk, quantized: QuantizedModel) -> dict[str, int | None]:
    """The first layer that uses each group's weights, None for a head's.

    Layers may share weights, and a checkpoint stores those under any of them.
    """
    layer_of: dict[int, int] = {}
    for index, block in enumerate(trunk.blocks):
        for module in block.modules():
            layer_of.setdefault(id(module), index)
    used: dict[str, list[int]] = {}
    for name, module in quantized.modules():
        if id(module) in layer_of:
            used.setdefault(name, []).append(layer_of[id(module)])
    return {
        group.name: min(used[group.name]) if group.name in used else group.layer
        for group in quantized.groups
    }
