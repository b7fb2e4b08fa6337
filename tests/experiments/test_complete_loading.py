"""A loader of an engine that leaves parameters as they were is found."""

from collections.abc import Callable

import pytest
import torch

from experiments.architectures.complete import load_all

NUMBERS = torch.arange(1.0, 9.0).reshape(2, 4)
KINDS = {
    "bf16": NUMBERS.bfloat16(),
    "fp8": NUMBERS.to(torch.float8_e4m3fn),
    "packed": NUMBERS.to(torch.uint8),
}


def model_of(**tensors: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for name, tensor in tensors.items():
        own = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        model.register_parameter(name, own)
    return model


def writing(model: torch.nn.Module, *names: str, rows: int = 2) -> Callable[[], None]:
    def load() -> None:
        for name in names:
            model.get_parameter(name).data[:rows].copy_(KINDS[name][:rows])

    return load


def test_what_is_written_whole_is_what_was_loaded():
    model = model_of(**KINDS)
    load_all(model, writing(model, *KINDS))
    for name, tensor in KINDS.items():
        assert model.get_parameter(name).float().equal(tensor.float())


@pytest.mark.parametrize("left", KINDS)
def test_a_parameter_that_nothing_writes_is_named(left):
    model = model_of(**KINDS)
    with pytest.raises(RuntimeError, match=f"1 parameters are not loaded: {left}"):
        load_all(model, writing(model, *(name for name in KINDS if name != left)))


@pytest.mark.parametrize("left", KINDS)
def test_a_row_that_nothing_writes_is_found(left):
    model = model_of(**{left: KINDS[left]})
    with pytest.raises(RuntimeError, match=left):
        load_all(model, writing(model, left, rows=1))


def test_parameters_that_no_checkpoint_holds_keep_their_values():
    one = torch.ones(())
    model = model_of(k_scale=one, unused=one)
    load_all(model, lambda: None, unused=("unused",))
    assert model.get_parameter("k_scale").item() == model.get_parameter("unused").item() == 1
