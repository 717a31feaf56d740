"""What the measuring machine is asked and told:
which core a process keeps to, and who uses the CPU.

Only Linux answers; elsewhere processes run where they like and the figures are ``None``.
"""

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def two_cores() -> tuple[int | None, int | None]:
    """A core for the server and one for everything else;
    none where there are not two, or no choice.
    """
    return (_CORES[0], _CORES[1]) if len(_CORES) > 1 else (None, None)


def pin(pid: int, core: int | None) -> None:
    """Keep every thread of a process on *core*; what it starts stays there too."""
    if sys.platform == "linux" and core is not None:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def cpu_seconds(pid: int) -> float | None:
    """CPU time of all threads of a process so far."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return None
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _busy_seconds() -> float | None:
    """CPU time so far that anybody has had of the two cores,
    or that the host of a virtual machine kept.
    """
    path = Path("/proc/stat")
    if not path.exists() or len(_CORES) < 2:
        return None
    ours = {f"cpu{core}" for core in _CORES[:2]}
    lines = [line.split() for line in path.read_text().splitlines()]
    # user, nice, system; not idle and iowait; irq, softirq, steal
    ticks = sum(int(line[i]) for line in lines if line[0] in ours for i in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """The CPU time that has gone by at one moment, in seconds."""

    at: float
    everybody: float | None
    ours: float

    @classmethod
    def now(cls, *pids: int) -> "Usage":
        """Look; *pids* are ours, as are this process and those it has waited for."""
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        ours = time.process_time() + waited.ru_utime + waited.ru_stime
        return cls(time.monotonic(), _busy_seconds(), ours + sum(cpu_seconds(pid) or 0.0 for pid in pids))

    def others_since(self, before: "Usage") -> float | None:
        """How many cores others have used since *before*."""
        if self.everybody is None or before.everybody is None:
            return None
        theirs = (self.everybody - before.everybody) - (self.ours - before.ours)
        return theirs / (self.at - before.at)
