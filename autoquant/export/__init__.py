"""The exported checkpoint: written, described, read back and verified."""
