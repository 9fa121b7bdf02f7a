"""What srun says about the tasks it lost, read from its messages."""

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.faults import Departure
from launcher.slurm.hostlist import expand_hosts

_TASK = re.compile(r"^srun: error: (?P<node>[\w.,\[\]-]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
_CODE = re.compile(r"^Exited with exit code (\d+)")
_NODE = re.compile(r"(?i)^srun: error: .*node failure on (?P<nodes>\S+)")
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}
_MEMORY = "Out Of Memory"


@dataclass(frozen=True)
class StepReport:
    """Tasks that did not leave with 0 in the order in which srun noticed, and lost nodes."""

    departures: tuple[Departure, ...]
    nodes: dict[int, str]  # rank to node, for those above
    lost_nodes: tuple[str, ...]


def read_report(text: str, *, log_of: Callable[[int], Path]) -> StepReport:
    """Read what srun wrote to stderr."""
    departures: list[Departure] = []
    nodes: dict[int, str] = {}
    lost: list[str] = []
    for line in text.splitlines():
        found = _TASK.match(line.strip())
        if found:
            code = _code(found["how"])
            hosts = expand_hosts(found["node"])
            for rank in _numbers(found["tasks"]):
                nodes.setdefault(rank, hosts[0])
                departures.append(Departure(rank, code, log_of(rank)))
        failed = _NODE.match(line.strip())
        if failed:
            lost += expand_hosts(failed["nodes"].rstrip(".,"))
    return StepReport(tuple(departures), nodes, tuple(lost))


def _code(how: str) -> int:
    """Return an exit code, negative for a signal."""
    code = _CODE.match(how)
    if code:
        return int(code[1])
    if how.startswith(_MEMORY):
        return -signal.SIGKILL
    for name, number in _SIGNALS.items():
        if name and how.startswith(name):
            return -number
    return 1


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
