"""BF16 products as float32 products: the same numbers, in every way that a model multiplies."""

import gc

import pytest
import torch
from torch.nn import functional

from autoquant.environment import CpuPolicy
from autoquant.model import experts
from autoquant.model.products import CpuProducts, Float32Copies

A, B, C = (torch.randn(4, n, m, generator=torch.Generator().manual_seed(n)).bfloat16()
           for n, m in ((24, 40), (40, 16), (24, 16)))  # fmt: skip
LINEAR = torch.nn.Linear(40, 16, dtype=torch.bfloat16).requires_grad_(False)
STATE = torch.randn(4, 8, 32, 16, generator=torch.Generator().manual_seed(1)).bfloat16()

PRODUCTS = {
    "linear": (lambda a, w, b: functional.linear(a, w, b), (A, LINEAR.weight, LINEAR.bias)),
    "linear by name": (lambda a, w: functional.linear(input=a, weight=w), (A, LINEAR.weight)),
    "@": (lambda a, b: a @ b, (A, B)),
    "matmul": (torch.matmul, (A, B)),
    "Tensor.matmul": (lambda a, b: a.matmul(b), (A, B)),
    "mm": (torch.mm, (A[0], B[0])),
    "Tensor.mm": (lambda a, b: a.mm(b), (A[0], B[0])),
    "mv": (torch.mv, (A[0], B[0, :, 0])),
    "bmm": (torch.bmm, (A, B)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (C[0], A[0], B[0])),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.25), (C, A, B)),
    "Tensor.baddbmm": (lambda c, a, b: c.baddbmm(a, b), (C, A, B)),
    "addbmm": (torch.addbmm, (C[0], A, B)),
    "inner": (torch.inner, (A, A)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=1), (A[0], B[0])),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (A, B)),
    "einsum of a list": (lambda a, b: torch.einsum("bij,bjk->bik", [a, b]), (A, B)),
}


def float32() -> CpuProducts:
    return CpuProducts(CpuPolicy.FLOAT32)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_of_float32_copies_rounded_once(name):
    product, operands = PRODUCTS[name]
    expected = product(*(x.float() for x in operands)).bfloat16()
    with float32().active():
        result = product(*operands)
    assert result.dtype is torch.bfloat16
    assert torch.equal(result, expected)


def test_a_product_is_written_where_it_is_wanted():
    out = torch.empty_like(C[0])
    with float32().active():
        result = torch.mm(A[0], B[0], out=out)
    assert result is out
    assert torch.equal(out, (A[0].float() @ B[0].float()).bfloat16())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_causal_or_whole(causal):
    expected = functional.scaled_dot_product_attention(*[STATE.float()] * 3, is_causal=causal)
    with float32().active():
        result = functional.scaled_dot_product_attention(*[STATE] * 3, is_causal=causal)
    assert torch.equal(result, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_attention_with_a_mask_and_shared_keys(dtype):
    keys = STATE[:, :2]
    allowed = torch.ones(32, 32, dtype=torch.bool).tril()
    mask = allowed if dtype is torch.bool else torch.zeros(32, 32).masked_fill(~allowed, -1e4)
    expected = functional.scaled_dot_product_attention(
        STATE.float(), keys.float(), keys.float(), enable_gqa=True,
        attn_mask=mask if dtype is torch.bool else mask.to(dtype).float(),
    )  # fmt: skip
    with float32().active():
        result = functional.scaled_dot_product_attention(
            STATE, keys, keys, attn_mask=mask.to(dtype), enable_gqa=True
        )
    assert torch.equal(result, expected.bfloat16())


def test_a_gradient_is_that_of_float32_products():
    inputs = [A.clone().requires_grad_() for _ in range(2)]
    inner = functional.linear(inputs[0].float(), LINEAR.weight.float()).bfloat16()
    (inner.float() @ B[0].t().float()).bfloat16().backward(A)
    with float32().active():
        result = functional.linear(inputs[1], LINEAR.weight) @ B[0].t()
    result.backward(A)
    assert torch.equal(inputs[1].grad, inputs[0].grad)


@pytest.mark.parametrize("kept", [True, False])
def test_experts_forward_and_backward(kept):
    counts = [5, 0, 33, 2]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4, 24, 32, generator=generator).bfloat16()
    gradient = torch.randn(sum(counts), 24, generator=generator).bfloat16()
    # Small integers: every sum is exact, in whatever order and with whichever neighbours.
    rows.data, weight, gradient = (x.round() for x in (rows.data, weight, gradient))
    products = CpuProducts(CpuPolicy.FLOAT32, copies_bytes=2**20 if kept else 0)
    with products.active():
        result = experts.grouped_linear(rows, weight, torch.tensor(counts))
    result.backward(gradient)
    parts = zip(rows.detach().split(counts), gradient.split(counts), weight, strict=True)
    forward, backward = zip(
        *((r.float() @ w.float().t(), g.float() @ w.float()) for r, g, w in parts), strict=True
    )
    assert torch.equal(result, torch.cat(forward).bfloat16())
    assert torch.equal(rows.grad, torch.cat(backward).bfloat16())
    assert products.copies.bytes == (4 * weight.numel() if kept else 0)


def test_other_types_and_what_is_outside_are_left_alone():
    double = A.double()
    with float32().active():
        assert torch.equal(double @ B.double(), double.matmul(B.double()))
        assert (A.float() @ B.float()).dtype is torch.float32
        with pytest.raises(RuntimeError, match="dtype"):
            functional.linear(A, LINEAR.weight.float())
    before = A @ B
    with pytest.raises(KeyError), float32().active():
        raise KeyError
    assert torch.equal(A @ B, before)


def test_a_processor_with_bf16_multiplies_as_before():
    products = CpuProducts(CpuPolicy.BF16)
    expected = A @ B
    with products.active():
        assert torch._C._len_torch_function_stack() == 0
        assert torch.equal(A @ B, expected)
        functional.linear(A, LINEAR.weight)
    assert products.copies.bytes == 0


def test_a_weight_is_copied_once_and_no_longer_than_it_lives():
    copies = Float32Copies(2**20)
    weight = LINEAR.weight.clone()
    copy = copies.of(weight)
    assert torch.equal(copy, weight.float())
    assert copies.of(weight) is copy
    assert copies.bytes == 4 * weight.numel()
    del weight
    gc.collect()
    assert copies.bytes == 0


def test_a_weight_that_changed_is_copied_again():
    copies = Float32Copies(2**20)
    weight = LINEAR.weight.clone()
    copies.of(weight)
    with torch.inference_mode():
        weight[0] = 7.0
    assert torch.equal(copies.of(weight), weight.float())
    weight.data = LINEAR.weight.clone()
    assert torch.equal(copies.of(weight), LINEAR.weight.float())
    assert copies.bytes == 4 * weight.numel()


def test_copies_stay_below_their_limit():
    weights = [LINEAR.weight.clone() for _ in range(3)]
    copies = Float32Copies(2 * 4 * weights[0].numel())
    assert [copies.find(weight) is not None for weight in weights] == [True, True, False]
    assert torch.equal(copies.of(weights[2]), weights[2].float())
    assert copies.bytes <= copies.limit_bytes


def test_a_tensor_whose_changes_are_not_counted_is_copied_each_time():
    copies = Float32Copies(2**20)
    with torch.inference_mode():
        weight = LINEAR.weight.clone()
        copies.of(weight)
        weight[0] = 7.0
        assert torch.equal(copies.of(weight), weight.float())
    assert copies.find(LINEAR.weight.clone().requires_grad_()) is None
