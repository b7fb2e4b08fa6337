"""Sizes of channels, and the powers of two that bring them nearer."""

import pytest
import torch

from autoquant.equalize.channels import Channels, Powers, by_tensor, powers_of
from autoquant.equalize.sites import Part, Site


def site(**changes):
    given = {
        "part": Part.DOWN,
        "name": "up",
        "channels": 4,
        "input_set": "down",
        "matrix": None,
        "rows": ("up.weight",),
        "columns": ("down.weight",),
    }
    return Site(**(given | changes))


def shown(*sizes, rows=100):
    return Channels(torch.tensor(sizes).double().square() * rows, rows)


def test_half_of_the_distance_is_taken_away():
    seen = {"down": {0: shown(1.0, 1.0, 32.0, 1.0)}}
    assert powers_of(site(), seen, 0.5).tolist() == [1, 1, -2, 1]
    assert powers_of(site(), seen, 1.0).tolist() == [1, 1, -4, 1]


def test_all_experts_count_where_they_read_one_norm_and_one_alone_where_it_is_its_own():
    seen = {"down": {0: shown(1.0, 1.0, 1.0, 1.0), 1: shown(1.0, 64.0, 1.0, 1.0)}}
    assert powers_of(site(matrix=0), seen, 0.5).tolist() == [0, 0, 0, 0]
    assert powers_of(site(matrix=1), seen, 0.5).tolist() == [1, -2, 1, 1]
    assert powers_of(site(), seen, 0.5).tolist() == [1, -2, 1, 1]


@pytest.mark.parametrize(
    "seen",
    [
        {},
        {"down": {0: shown(1.0, 2.0, 64.0, 1.0, rows=63)}},
        {"down": {0: shown(0.0, 0.0, 0.0, 0.0)}},
        {"down": {0: shown(1.0, float("inf"), 1.0, 1.0)}},
        {"down": {0: shown(1.0, float("nan"), 1.0, 1.0)}},
        {"another": {0: shown(1.0, 2.0, 64.0, 1.0)}},
    ],
)
def test_channels_of_which_too_little_is_known_stay(seen):
    assert powers_of(site(), seen, 0.5).tolist() == [0, 0, 0, 0]


def test_a_dead_channel_is_not_blown_up():
    own = powers_of(site(), {"down": {0: shown(1.0, 1.0, 1.0, 0.0)}}, 1.0)
    assert own.max() <= 8
    assert own[3] == own.max()


def test_what_makes_channels_and_what_reads_them_are_scaled_against_each_other():
    first, second = site(), site(name="norm", rows=("norm.weight",), columns=("up.weight",))
    powers = torch.tensor([1, 0, -2, 3], dtype=torch.int8)
    own = by_tensor([first, second], [powers, -powers])
    assert own.keys() == {"up.weight", "down.weight", "norm.weight"}
    up, down, norm = torch.randn(4, 4), torch.randn(3, 4), torch.randn(4)
    x = torch.randn(5, 4)
    made = (x * own["norm.weight"].scaled(norm)) @ own["up.weight"].scaled(up).T
    expected = (x * norm) @ up.T @ down.T
    assert torch.allclose(made @ own["down.weight"].scaled(down).T, expected, rtol=1e-5, atol=1e-5)
    assert by_tensor([first], [torch.zeros(4, dtype=torch.int8)]) == {}


@pytest.mark.parametrize("value", [3e38, 2.0**-133])
def test_a_power_that_leaves_the_range_of_the_dtype_is_refused(value):
    weight = torch.tensor([value * 1.0], dtype=torch.bfloat16)
    power = torch.tensor([8 if value > 1 else -8], dtype=torch.int8)
    with pytest.raises(ValueError, match="range"):
        Powers(rows=power).scaled(weight)
