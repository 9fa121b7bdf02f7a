"""Kills the ranks and their workers when the launcher dies without a word (kill -9, out of memory).

A script of its own: it reads process groups from stdin, one a line, and `done` when there is
nothing left to do. If stdin ends before that, the launcher is gone and the groups are killed.
The death signal of the kernel reaches a rank, but not the loader workers below it.
"""

import contextlib
import os
import signal
import sys


def main() -> None:
    """Read groups until `done` or the end of stdin."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: list[int] = []
    for line in sys.stdin:
        if line.strip() == "done":
            return
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
