"""How CPU threads wait for each other while other programs run.

PyTorch's CPU threads meet after every operation. The thread that comes first turns in a loop for
milliseconds before it sleeps. On a quiet machine that is right, since a thread that slept is late.
Where other programs run, it turns on the core that the thread it waits for needs.

GNU OpenMP takes 100 turns instead of 300,000 while there are more OpenMP threads than cores (its
manual, `GOMP_SPINCOUNT`). A second team of threads makes it so. These threads sleep after their
first operation, and are there as long as others use the cores. What is computed does not change.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

OTHERS_CORES = 0.25
"""Cores' worth of other programs from which threads sleep at once; a quiet machine has a tenth."""
INTERVAL_S = 0.5
"""Least time between two looks: the kernel counts in hundredths of a second."""

_STAT = Path("/proc/stat")
_IDLE = (3, 4)
"""Columns of a processor's line that are no work: idle, and waiting for a disk."""
_COLUMNS = 8
"""Columns that add up to the time; those behind them are counted in these already."""


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """Seconds of the cores that this process may use."""

    wall: float
    busy: float
    """Of all cores together, whoever used them."""
    own: float
    """Of this process."""

    @classmethod
    def now(cls) -> "CoreTimes":
        """As Linux counts them."""
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        busy = 0
        for line in _STAT.read_text(encoding="ascii").splitlines():
            name, *columns = line.split()
            if name in allowed:
                ticks = list(map(int, columns[:_COLUMNS]))
                busy += sum(ticks) - sum(ticks[place] for place in _IDLE)
        return cls(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), time.process_time())

    def others_since(self, before: "CoreTimes") -> float:
        """Cores' worth of work that other programs did since `before`."""
        return ((self.busy - before.busy) - (self.own - before.own)) / (self.wall - before.wall)


class ThreadWaits:
    """Lets waiting threads of this process sleep at once while other programs use the cores.

    Does nothing where the user has said how threads wait (`OMP_WAIT_POLICY`, `GOMP_SPINCOUNT`),
    where there is one thread, and on systems other than Linux.
    """

    def __init__(self) -> None:
        self._before: CoreTimes | None = None
        self._team: _SleepingTeam | None = None

    @property
    def sleep_at_once(self) -> bool:
        """Whether threads that wait give their core away."""
        return self._team is not None

    def adapt(self) -> None:
        """Look at the cores, if the last look is long enough ago."""
        if sys.platform != "linux" or torch.get_num_threads() == 1 or _is_users():
            return
        before, now = self._before, CoreTimes.now()
        if before is not None and now.wall - before.wall < INTERVAL_S:
            return
        self._before = now
        if before is not None:
            self._change(now.others_since(before) > OTHERS_CORES)

    def _change(self, sleep_at_once: bool) -> None:
        if sleep_at_once and self._team is None:
            self._team = _SleepingTeam()
        elif not sleep_at_once and self._team is not None:
            self._team.end()
            self._team = None


def _is_users() -> bool:
    return bool(os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})


class _SleepingTeam:
    """As many OpenMP threads again, which do nothing."""

    _ELEMENTS = 1 << 20
    """Of one operation: enough for PyTorch to give a part to every thread."""

    def __init__(self) -> None:
        self._ended, ready = threading.Event(), threading.Event()

        def sleep() -> None:
            try:
                torch.zeros(self._ELEMENTS).add_(1)
            finally:
                ready.set()
            self._ended.wait()

        self._thread = threading.Thread(target=sleep, name="autoquant-sleeping-team", daemon=True)
        self._thread.start()
        ready.wait()

    def end(self) -> None:
        """Let the threads go."""
        self._ended.set()
        self._thread.join()


waits = ThreadWaits()
"""Of this process, whose OpenMP threads are one pool."""
