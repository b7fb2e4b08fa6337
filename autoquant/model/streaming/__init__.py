"""Weights of blocks that come and go: where they stay, how they are read, what memory it takes."""
