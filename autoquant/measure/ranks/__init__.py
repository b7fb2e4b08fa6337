"""Several processes that measure one model together."""
