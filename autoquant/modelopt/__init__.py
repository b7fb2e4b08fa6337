"""What AutoQuant chose in the hands of NVIDIA ModelOpt, and ModelOpt's search beside ours.

    from autoquant.modelopt import apply, auto_quantize

`apply` puts ModelOpt's quantizers on a model for a search's assignment, ready for further training
and `mto.save`. `auto_quantize` takes the arguments of `mtq.auto_quantize` and returns the same two
values, with AutoQuant's search behind it. Both need the extra `modelopt`.
"""

from autoquant.modelopt.quantizers import apply
from autoquant.modelopt.searching import auto_quantize

__all__ = ["apply", "auto_quantize"]
