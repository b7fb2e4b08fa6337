"""Checkpoints on disk: headers, streaming reads, export and verification."""
