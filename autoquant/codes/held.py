"""Where the weights of a model are while they are measured."""

from enum import StrEnum


class Weights(StrEnum):
    """Where the weights of blocks are while nothing computes with them."""

    AUTO = "auto"
    """The first of the others that fits."""
    RESIDENT = "resident"
    """On the device, all of them."""
    SHARDED = "sharded"
    """On the GPUs of a machine's processes, a part on each; a block at a time is whole on each."""
    HOST = "host"
    """In the host's memory; a block at a time is on the device."""
    DISK = "disk"
    """In the checkpoint's files; a block at a time is on the device."""


CODES_OF_A_BLOCK = 2
"""Memory for codes where blocks are streamed, in shares of a block in BF16: those of its linears in
every choice. Gradients try them all, batch after batch, and those of the default effort take less
than 4 bytes an element."""
