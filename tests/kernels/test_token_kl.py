"""KL per token against float64, on every backend."""

import autoquant_kernels as ak
import pytest
import torch
from kernel_cases import DTYPES, forced, fused_backends
from torch import Tensor

BACKENDS = ["reference", *fused_backends()]


def exact(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def logits(tokens: int, vocabulary: int, difference: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    p = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return p, p + difference * torch.randn(tokens, vocabulary, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (3, 7), (4, 1000), (2, 4097)])
def test_kl_equals_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    p, q = (x.to(dtype) for x in logits(*shape, 0.1))
    with forced(backend) as device:
        got = ak.token_kl(p.to(device), q.to(device)).cpu()
    torch.testing.assert_close(got.double(), exact(p, q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_difference_far_below_the_logits_is_resolved(backend: str) -> None:
    p, q = logits(64, 8192, 1e-3)
    p, q = p + 50, q + 45
    with forced(backend) as device:
        got = ak.token_kl(p.to(device), q.to(device)).cpu().double()
    assert (got - exact(p, q)).abs().mean() < 5e-7
    assert (got >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_infinite_and_nan(backend: str) -> None:
    p, q = logits(5, 5000, 0.1)
    p[0, :4500], q[0, :4500] = -torch.inf, -torch.inf
    q[1, 3] = -torch.inf
    p[2, 3] = -torch.inf
    q[3, 3] = torch.nan
    expected = exact(p, q)
    expected[0] = exact(p[:1, 4500:], q[:1, 4500:])[0]
    expected[2] = (
        exact(
            torch.cat((p[2, :3], p[2, 4:]))[None],
            q[2:3].log_softmax(-1)[:, [i for i in range(5000) if i != 3]],
        )[0]
        - (1 - q[2].softmax(-1)[3]).log()
    )
    with forced(backend) as device:
        got = ak.token_kl(p.to(device), q.to(device)).cpu().double()
    assert got[1] == torch.inf
    assert got[3].isnan()
    torch.testing.assert_close(got[[0, 2, 4]], expected[[0, 2, 4]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_head(backend: str, chunk: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden_p, weight = (torch.randn(n, 32, generator=generator) for n in (20, 9000))
    hidden_q = hidden_p + 0.05 * torch.randn(20, 32, generator=generator)
    bias = torch.randn(9000, generator=generator)
    expected = exact(hidden_p @ weight.T + bias, hidden_q @ weight.T + bias)
    with forced(backend) as device:
        inputs = (x.to(device) for x in (hidden_p, hidden_q, weight, bias))
        got = ak.head_token_kl(*inputs, chunk=chunk).cpu()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_no_tokens() -> None:
    assert ak.token_kl(torch.ones(0, 5), torch.ones(0, 5)).shape == (0,)
    assert ak.head_token_kl(torch.ones(0, 4), torch.ones(0, 4), torch.ones(5, 4)).shape == (0,)


def test_arguments_that_do_not_fit() -> None:
    p, h, w = torch.ones(2, 5), torch.ones(2, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match="same"):
        ak.token_kl(p, p[:, :4])
    with pytest.raises(ValueError, match="agree"):
        ak.token_kl(p, p.half())
    with pytest.raises(ValueError, match="empty"):
        ak.token_kl(torch.ones(2, 0), torch.ones(2, 0))
    with pytest.raises(ValueError, match=r"\[V, D\]"):
        ak.head_token_kl(h, h, w[:, :3])
    with pytest.raises(ValueError, match="two dimensions"):
        ak.head_token_kl(h, h, w.half())
    with pytest.raises(ValueError, match="bias"):
        ak.head_token_kl(h, h, w, torch.ones(4))
    with pytest.raises(ValueError, match="chunk=0"):
        ak.head_token_kl(h, h, w, chunk=0)
    with pytest.raises(ValueError, match="no rows"):
        ak.head_token_kl(h, h, w[:0])
