"""Since when this process is there: what it takes to import the launcher is part of a start."""

import os
import time
from pathlib import Path

_MOST_SECONDS = 600.0  # an older process has done something else before; or its clock is not ours


def process_began() -> float:
    """Return when this process was started, in seconds since 1970; now where nobody says."""
    now = time.time()
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])  # field 22, see proc(5): since boot
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return now
    age = uptime - ticks / os.sysconf("SC_CLK_TCK")
    return now - age if 0.0 <= age <= _MOST_SECONDS else now
