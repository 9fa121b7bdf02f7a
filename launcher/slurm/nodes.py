"""Nodes that let a run down: `nodes.jsonl` in the run folder, and whom to ask for instead.

Only faults that look like the machine's count; a bug would put every node out of use. To trust a
node again, take its lines out of the file.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cocoa_dist.manifest import write_atomic

NODES_NAME = "nodes.jsonl"
_MOST_REQUESTS = 2  # of a job, for the same node
_HARDWARE = re.compile(
    r"(?i)SIG(?:KILL|BUS)|\bECC\b|\bXid\b|uncorrectable|NVLink|fallen off the bus|hardware"
    r"|CUDA error|device-side|Input/output error|was lost|unfit"
)


class NodeNote(BaseModel):
    """One line: a fault of a node, or that a job has asked for another one instead of it."""

    model_config = ConfigDict(frozen=True)

    node: str
    job: str
    time: float  # seconds since 1970
    reason: str
    weight: int = 1  # faults this one counts for; 0: no fault, but a request


def looks_like_hardware(reason: str) -> bool:
    """Whether a crash may be the machine's doing."""
    return bool(_HARDWARE.search(reason))


def record_fault(run_dir: Path, *, node: str, job: str, reason: str, weight: int = 1) -> None:
    """Append a fault of a node."""
    if node:
        _append(
            run_dir, NodeNote(node=node, job=job, time=time.time(), reason=reason, weight=weight)
        )


def excluded_nodes(run_dir: Path, *, allowed: int) -> set[str]:
    """Return the nodes with at least `allowed` faults."""
    counts: Counter[str] = Counter()
    for note in read_notes(run_dir):
        counts[note.node] += note.weight
    return {node for node, number in counts.items() if number >= allowed}


def request_others(run_dir: Path, *, nodes: Sequence[str], job: str, allowed: int) -> bool:
    """Leave word for the batch script that `nodes` shall be excluded; False if that is of no use.

    A job that was given a node again and again although it asked for others stops asking.
    """
    asked = Counter(n.node for n in read_notes(run_dir) if n.weight == 0 and n.job == job)
    if all(asked[node] >= _MOST_REQUESTS for node in nodes):
        return False
    for node in nodes:
        note = NodeNote(node=node, job=job, time=time.time(), reason="asked for others", weight=0)
        _append(run_dir, note)
    everything = ",".join(sorted(excluded_nodes(run_dir, allowed=allowed)))
    (run_dir / "submit").mkdir(exist_ok=True)
    write_atomic(run_dir / "submit" / f"{job}.exclude", everything.encode())
    return True


def read_notes(run_dir: Path) -> Iterator[NodeNote]:
    """Yield all whole lines."""
    try:
        lines = (run_dir / NODES_NAME).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield NodeNote.model_validate_json(line)
        except ValueError:
            continue


def _append(run_dir: Path, note: NodeNote) -> None:
    with (run_dir / NODES_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note.model_dump()) + "\n")
