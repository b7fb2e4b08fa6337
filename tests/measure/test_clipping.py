"""What a whole assignment clips of its inputs: each group's elements beyond its scale, once."""

import pytest
import torch
from searchable import save_searchable
from test_scores import SPLIT, scorer_of

from autoquant.formats import BF16, FP8, NVFP4
from autoquant.measure.statistics.clipping import clipped_by_group, describe_clipped
from autoquant.model.inputs import InputScale
from autoquant.plan.assignment import Assignment


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """The rows, elements and clipped ones seen by hooks, and two assignments to compare."""
    scorer = scorer_of(save_searchable("llama", tmp_path_factory.mktemp("clipping") / "source"))
    quantized = scorer.quantized
    ranges = {
        linear.input_scale_set: 0.5
        for group in quantized.groups
        for linear in group.linears
        if group.role != "head"
    }
    quantized.set_input_scales({name: InputScale(amax=amax) for name, amax in ranges.items()})
    chosen = [group for group in quantized.groups if group.role in ("qkv", "o", "down")]
    assignment = Assignment.of(
        {group.name: FP8 if group.role == "o" else NVFP4 for group in chosen}
    )
    seen: dict[str, list[int]] = {}

    def hook(name, choice):
        def see(_, arguments):
            largest = choice.format.largest_input(choice.format.input_scale(0.5))
            (x,) = arguments
            seen.setdefault(name, [0, 0])
            seen[name][0] += int((x.float().abs() > largest).sum())
            seen[name][1] += x.numel()

        return see

    scorer.score(assignment, SPLIT)  # which also leaves the BF16 model's states
    handles = []
    for group in chosen:
        module = next(m for name, m in quantized.modules() if name == group.name)
        handles.append(module.register_forward_pre_hook(hook(group.name, assignment[group.name])))
    (scores,) = scorer.score_fully([assignment], SPLIT)
    rows = clipped_by_group(quantized.groups, scores.clipped)
    for handle in handles:
        handle.remove()
    last = Assignment.of({**dict(assignment), chosen[-1].name: BF16})
    return rows, seen, (scorer, assignment, last)


def test_each_group_counts_what_its_scale_does_not_hold(counted):
    rows, seen, _ = counted
    assert {row.group: [row.clipped, row.elements] for row in rows} == seen
    assert [row.group for row in rows] == [*seen], "in the order of the forward pass"
    assert all(0 < row.clipped < row.elements for row in rows if row.group.endswith("qkv"))


def test_totals_and_shares_are_those_of_the_rows(counted):
    rows, seen, _ = counted
    found = describe_clipped(rows, 2.0)
    assert found["headroom"] == 2.0
    assert found["clipped"] == sum(clipped for clipped, _ in seen.values())
    assert found["elements"] == sum(elements for _, elements in seen.values())
    assert found["groups"] == {
        name: clipped / elements for name, (clipped, elements) in seen.items() if clipped
    }
    assert torch.tensor([*found["groups"].values()]).max() < 1.0


def test_a_forward_that_begins_where_another_leaves_counts_the_blocks_before_too(counted):
    scorer, first, last = counted[2]
    apart = []
    for assignment in (first, last):
        scorer.forget(SPLIT)
        apart += scorer.score_fully([assignment], SPLIT)
    scorer.forget(SPLIT)
    together = scorer.score_fully([first, last, first], SPLIT)
    assert [own.clipped for own in together] == [*(own.clipped for own in apart), apart[0].clipped]
    (again,) = scorer.score_fully([last], SPLIT)
    (once_more,) = scorer.score_fully([first], SPLIT)  # from the states of the one before it
    assert (again.clipped, once_more.clipped) == (apart[1].clipped, apart[0].clipped)
    assert apart[0].clipped != apart[1].clipped
