"""What a search takes of a GPU beside the weights and their codes, and is kept within."""

from autoquant.codes.held import CODES_OF_A_BLOCK

BLOCKS_AT_ONCE = 3 + CODES_OF_A_BLOCK
"""Blocks' worth of memory where blocks are streamed: the present one, the next, one of decoded
codes, and the codes. On a CPU also the parts that the next one is put together from."""

ACTIVATION_SHARE, ACTIVATION_BYTES = 1 / 16, 1 << 29
"""What a stage may take, in shares of the weights that are there where blocks are streamed, and in
any case: beside a small model's weights, shares of theirs are nothing."""
STATE_SHARE, STATE_BYTES = 1 / 50, 1 << 28
"""What states between stages may take, in shares of the weights on the device and in any case; more
of them wait in the host's memory."""
LOGIT_TILE_BYTES, TILES_AT_ONCE = 1 << 28, 3
"""A tile of float32 logits, and how many are alive together at most: one of each model, and what is
computed of them."""
KEPT_LOGIT_BYTES = 1 << 28
"""For tiles of the BF16 model's that are kept between candidates."""
LIBRARY_BYTES = 1 << 26
"""What cuBLAS takes of PyTorch's memory, and other small things."""


def activation_bytes(outside: int, largest_block: int, all_weights: int) -> int:
    """Bytes that a stage may take: the same wherever the weights are.

    Args:
        outside: bytes of the weights in no block.
        largest_block: of those of the largest block.
        all_weights: of all of them.
    """
    streamed = min(all_weights, outside + BLOCKS_AT_ONCE * largest_block)
    return max(ACTIVATION_BYTES, int(ACTIVATION_SHARE * streamed))


def state_bytes(weights: int) -> int:
    """Bytes that states between stages may take in any case, beside so many bytes of weights."""
    return max(STATE_BYTES, int(STATE_SHARE * weights))


def bytes_beside(weights: int, activations: int, *, block_leaves: int) -> int:
    """Most that is taken beside the weights: while a stage runs, or behind all of them.

    Args:
        weights: bytes of them on the device.
        activations: bytes that a stage may take.
        block_leaves: bytes of the next block, which is not there behind the last stage.
    """
    behind = TILES_AT_ONCE * LOGIT_TILE_BYTES - block_leaves
    kept = state_bytes(weights) + KEPT_LOGIT_BYTES + LIBRARY_BYTES
    return kept + max(activations, behind)
