"""Python's garbage collector, which rests while a process of ours imports what it works with.

PyTorch and transformers define 700,000 objects that stay. The collections meanwhile look at them
again and again and find nothing: a sixth of the processor time of a small search.
"""

import gc

_rests = False


def rest() -> None:
    """Collect nothing until `resume`. For processes that AutoQuant starts or is started as."""
    global _rests
    gc.disable()
    _rests = True


def resume() -> None:
    """Collect again, and never look at what exists now. Does nothing where `rest` was not called:
    what a caller of the API has made may become garbage.
    """
    global _rests
    if _rests:
        gc.freeze()
        gc.enable()
        _rests = False
