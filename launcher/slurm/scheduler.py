"""What SLURM says about a job, read from `scontrol show job -o` and `squeue`; nothing is cached.

Every function works without the commands, too (in a container, on a laptop): it then says that it
does not know. Accounting (`sacct`) is never needed.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

_SECONDS = 20.0  # a controller that takes longer counts as not there
_FIELD = re.compile(r"(?:^| )([A-Za-z_][\w/:]*)=")
_NOTHING = ("", "(null)", "None", "N/A", "Unknown")


@dataclass(frozen=True)
class Job:
    """One job as `scontrol show job -o` describes it; "" where there is nothing."""

    fields: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        value = self.fields.get(name, "")
        return "" if value in _NOTHING else value

    @property
    def state(self) -> str:
        """Return JobState, such as RUNNING."""
        return self["JobState"]

    @property
    def restarts(self) -> int:
        """How often it was queued again."""
        return int(self["Restarts"] or 0)

    @property
    def preempted(self) -> bool:
        """Whether SLURM has told it to leave for another job."""
        return bool(self["PreemptTime"])


def parse_job(line: str) -> Job:
    """Read one line of `scontrol show job -o`; values may hold spaces and equals signs."""
    places = list(_FIELD.finditer(line))
    ends = [place.start() for place in places[1:]] + [len(line)]
    fields: dict[str, str] = {}
    for place, end in zip(places, ends, strict=True):
        fields.setdefault(place[1], line[place.end() : end].strip())
    return Job(fields)


def submitted_at(job: str) -> float | None:
    """Return when a job was submitted, in seconds since 1970; None if that is not known."""
    known = show_job(job)
    try:
        # SLURM writes local time, without the offset.
        return datetime.fromisoformat(known["SubmitTime"]).timestamp() if known else None
    except ValueError:
        return None


def show_job(job: str, *, seconds: float = _SECONDS) -> Job | None:
    """Return what the controller knows of a job; None if it does not answer or know it."""
    done = _ask("scontrol", "show", "job", "-o", job, seconds=seconds)
    if done is None or done.returncode or "JobState=" not in done.stdout:
        return None
    return parse_job(done.stdout.splitlines()[0])


def job_state(job: str) -> str | None:
    """Return the state of a job in the queue, "" if it has left it, None if nobody can say."""
    done = _ask("squeue", "--noheader", "--jobs", job, "--format", "%T")
    if done is None:
        return None
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else None
    words = done.stdout.split()
    return words[0] if words else ""


def _ask(*command: str, seconds: float = _SECONDS) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
