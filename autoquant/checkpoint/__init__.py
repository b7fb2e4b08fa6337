"""The earlier name of `autoquant.source`."""
