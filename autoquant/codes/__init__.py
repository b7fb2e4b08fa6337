"""Codes of weights: where weights come from, how they are encoded, and where codes are kept."""
