"""The earlier name of `autoquant.plan.grouping`, for programs that import it."""

import warnings

from autoquant.plan.grouping import Groups, find_groups

__all__ = ["Groups", "find_groups"]

warnings.warn("autoquant.grouping is now autoquant.plan.grouping", DeprecationWarning, stacklevel=2)
