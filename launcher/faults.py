"""Reads what a rank died of from its exit code and the end of its log."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_HUNG_CODE = 94  # of a rank's watchdog (cocoa_dist.runtime.EXIT_HUNG)
_MAX_LINE = 300
_MAX_LINES = 40
_ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]:\s*)?(?P<error>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b(?::.*)?)$"
)
# What a rank dies of because another one is gone.
_PEER = re.compile(
    r"(?i)closed by peer|reset by peer|connection refused|broken pipe|gloo.*(timed out|timeout)"
    r"|recvvalue failed|nccl.*(abort|remote)|waits for the other ranks|monitoredbarrier"
)


@dataclass(frozen=True)
class Departure:
    """A rank that did not leave with 0; `code` is negative for a signal."""

    rank: int
    code: int
    log: Path

    def describe(self) -> str:
        """Return rank, code or signal, and the last error line of the log."""
        line = last_error_line(self.log)
        return f"rank {self.rank} {_describe_code(self.code)}{': ' + line if line else ''}"


def choose_culprit(departures: Sequence[Departure]) -> Departure:
    """Return the first that did not just lose another rank; the first at all if there is none."""
    for item in departures:
        if not _PEER.search(last_error_line(item.log)):
            return item
    return departures[0]


def last_error_line(log: Path) -> str:
    """Return the last line of the form `SomeError: text`, else the last line; "" without any."""
    lines = _tail(log)
    for line in reversed(lines):
        found = _ERROR_LINE.match(line)
        if found:
            return found["error"][:_MAX_LINE]
    return lines[-1].strip()[:_MAX_LINE] if lines else ""


def last_lines(log: Path) -> str:
    """Return the last message of the log: its last line, from the line that is not indented."""
    lines = _tail(log)[-_MAX_LINES:]
    first = len(lines) - 1
    while first > 0 and lines[first][:1].isspace():
        first -= 1
    return "\n".join(lines[max(first, 0) :]) or f"no message in {log}"


def _tail(log: Path) -> list[str]:
    """Return the non-empty lines at the end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _describe_code(code: int) -> str:
    if code == _HUNG_CODE:
        return "hung and ended itself"
    if code >= 0:
        return f"left with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
