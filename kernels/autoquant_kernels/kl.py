"""KL divergence per token between two next-token distributions, without a full float32 buffer."""

import torch
from torch import Tensor

from autoquant_kernels import ops
from autoquant_kernels.checks import output, require_float

CPU_TILE_TOKENS = 256
CPU_TILE_VOCABULARY = 8192
GPU_TILE_BYTES = 3 << 27
GPU_TILE_TOKENS = 128


def token_kl(reference_logits: Tensor, logits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """KL(softmax(reference_logits) || softmax(logits)) of every token, in nats, full vocabulary.

    Args:
        reference_logits: `[T, V]`, bfloat16, float16 or float32; P, the unquantized model.
        logits: `[T, V]`, the same dtype and device; Q.
        out: where to write, float32 `[T]`.

    Returns:
        float32 `[T]`, never negative. Logits of -inf in both count as probability 0; a token where
        Q alone has -inf is inf, a NaN logit makes its token NaN.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or `out` that does not fit.
    """
    require_float("reference_logits", reference_logits)
    require_float("logits", logits)
    if reference_logits.ndim != 2 or reference_logits.shape != logits.shape:
        raise ValueError(
            f"reference_logits are {tuple(reference_logits.shape)} and logits "
            f"{tuple(logits.shape)}; both must be the same [tokens, vocabulary]."
        )
    if reference_logits.dtype != logits.dtype:
        raise ValueError(
            f"reference_logits are {reference_logits.dtype} and logits {logits.dtype}; "
            "cast one so that they agree."
        )
    if logits.shape[1] == 0:
        raise ValueError("the vocabulary is empty; logits need at least one column.")
    shape = (logits.shape[0],)
    out = output(out, shape, torch.float32, reference_logits, logits)
    if logits.shape[0]:
        ops.token_kl(reference_logits.detach().contiguous(), logits.detach().contiguous(), out)
    return out


def head_token_kl(
    hidden_reference: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """`token_kl` of the logits `hidden @ weight.T + bias`, of which only a chunk ever exists.

    The products accumulate in float32 and stay float32, so that rounding of the logits to bfloat16
    (about 1e-4 nats) does not hide what quantization does.

    Args:
        hidden_reference: `[T, D]`, what enters the language-model head of the unquantized model.
        hidden: `[T, D]`, the same dtype and device, of the quantized model.
        weight: `[V, D]`, the head, the same dtype and device.
        bias: `[V]` or None.
        chunk: tokens per chunk; by default 256 on a CPU, and on a GPU as many as keep the two
            tiles of logits below 0.8 GiB.

    Returns:
        float32 `[T]`, nats per token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or `chunk` below 1.
    """
    _check_head(hidden_reference, hidden, weight, bias)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows = _default_chunk(hidden.device, vocabulary) if chunk is None else chunk
    if rows < 1:
        raise ValueError(f"chunk={chunk}; it must be at least 1 token.")
    rows = min(rows, max(1, tokens))
    out = output(None, (tokens,), torch.float32, hidden_reference, hidden, weight)
    tiles = torch.empty((2, rows, vocabulary), dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            p_tile, q_tile = tiles[0, : stop - start], tiles[1, : stop - start]
            _logits(hidden_reference[start:stop], weight, bias, p_tile)
            _logits(hidden[start:stop], weight, bias, q_tile)
            ops.token_kl(p_tile, q_tile, out[start:stop])
    return out


def _default_chunk(device: torch.device, vocabulary: int) -> int:
    if device.type == "cpu":
        return CPU_TILE_TOKENS
    rows = max(1, GPU_TILE_BYTES // (4 * vocabulary))
    return rows - rows % GPU_TILE_TOKENS if rows > GPU_TILE_TOKENS else rows


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: Tensor) -> None:
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=tile)
    else:
        inputs = hidden.float()
        for start in range(0, weight.shape[0], CPU_TILE_VOCABULARY):
            stop = min(start + CPU_TILE_VOCABULARY, weight.shape[0])
            tile[:, start:stop] = inputs @ weight[start:stop].float().T
    if bias is not None:
        tile += bias.float()


def _check_head(reference: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, x in (("hidden_reference", reference), ("hidden", hidden), ("weight", weight)):
        require_float(name, x)
        if x.ndim != 2 or x.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype}; it must have two dimensions and the dtype "
                f"of hidden, {hidden.dtype}."
            )
    if reference.shape != hidden.shape or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden_reference {tuple(reference.shape)}, hidden {tuple(hidden.shape)} and weight "
            f"{tuple(weight.shape)}; they must be [T, D], [T, D] and [V, D]."
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; the vocabulary needs at least one token.")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},).")
