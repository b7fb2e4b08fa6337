"""The earlier name of `autoquant.source.source`, for programs that import it."""

import warnings

from autoquant.source.source import Source, open_source

__all__ = ["Source", "open_source"]

warnings.warn(
    "autoquant.checkpoint.source is now autoquant.source.source",
    DeprecationWarning,
    stacklevel=2,
)
