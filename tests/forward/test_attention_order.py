"""Gradients of attention that add in one order: the same gradients, asked for in their place."""

import pytest
import torch
from torch.nn import functional

from autoquant.forward import attention_order
from autoquant.forward.attention_order import attention_in_one_order

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 16, 8, generator=generator).requires_grad_() for _ in range(3)]


def gradients(given, **named):
    output = functional.scaled_dot_product_attention(*given, **named)
    output.square().sum().backward()
    return output, [own.grad for own in given]


@pytest.fixture
def asked(monkeypatch):
    """Whether one order was asked for, at each backward pass of attention alone, and of what."""
    seen, grad = [], torch.autograd.grad

    def watched(output, *given, **named):
        seen.append((torch.are_deterministic_algorithms_enabled(), output.grad_fn.name()))
        return grad(output, *given, **named)

    monkeypatch.setattr(attention_order.torch.autograd, "grad", watched)
    return seen


def test_the_gradients_are_those_of_attention_and_only_they_are_asked_for(monkeypatch, asked):
    expected = gradients(operands(), is_causal=True)
    monkeypatch.setattr(attention_order, "_is_fused", lambda *_, **__: True)
    with attention_in_one_order(GPU):
        found = gradients(operands(), is_causal=True)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other)
    ((is_asked, of),) = asked
    assert is_asked
    assert "ScaledDotProduct" in of
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("why", ["a CPU", "no fused kernel", "no gradient"])
def test_other_attention_is_left_alone(monkeypatch, asked, why):
    monkeypatch.setattr(attention_order, "_is_fused", lambda *_, **__: why != "no fused kernel")
    with attention_in_one_order(CPU if why == "a CPU" else GPU):
        if why == "no gradient":
            with torch.no_grad():
                assert functional.scaled_dot_product_attention(*operands()).grad_fn is None
            return
        gradients(operands(), is_causal=True)
    assert not asked


def test_what_was_asked_for_before_is_asked_for_again(monkeypatch):
    monkeypatch.setattr(attention_order, "_is_fused", lambda *_, **__: True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with attention_in_one_order(GPU):
            gradients(operands())
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_mask_with_a_gradient_needs_the_plain_kernel():
    query, key, value = (own.detach() for own in operands())
    mask = torch.zeros(16, 16).requires_grad_()
    assert not attention_order._is_fused(query, key, value, mask)
    assert not attention_order._is_fused(query, key, value), "no fused CUDA kernel on a CPU"
