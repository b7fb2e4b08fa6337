"""Candidates that race through the batches of a split in this process."""
