"""What states between stages take of a device, over all forwards that are on their way."""

import weakref

import torch


class HeldStates:
    """Counts states from when they are kept until nobody has them any more.

    Forwards, gradients and references each keep states for their own time, and share one bound.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._known: set[int] = set()

    def take(self, state: torch.Tensor, most: int) -> bool:
        """Whether a state is counted, or may be: whether all together are `most` bytes then."""
        if id(state) in self._known:
            return True
        if self.bytes + state.nbytes > most:
            return False
        self.bytes += state.nbytes
        self._known.add(id(state))
        weakref.finalize(state, self._gone, id(state), state.nbytes).atexit = False
        return True

    def _gone(self, known: int, size: int) -> None:
        self._known.remove(known)
        self.bytes -= size
