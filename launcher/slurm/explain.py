"""Why a job runs or does not, in the words of somebody who has to do something about it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.slurm.jobs import newest_job
from launcher.slurm.scheduler import Job, show_job

_WORDS = {
    "Resources": "waits for nodes to become free",
    "Priority": "waits behind jobs of higher priority",
    "BeginTime": "is held for a moment after a requeue, and starts by itself{begin}",
    "Dependency": "waits for the job before it ({Dependency})",
    "DependencyNeverSatisfied": "will never start: the job it waits for failed; "
    "scancel {JobId}, then submit again",
    "JobHeldUser": "is held by its user: scontrol release {JobId}",
    "JobHeldAdmin": "is held by an administrator: ask them",
    "JobHoldMaxRequeue": "was queued again too often and is held: scontrol release {JobId}",
    "PartitionDown": "waits for partition {Partition}, which is down",
    "PartitionInactive": "waits for partition {Partition}, which takes no jobs now",
    "PartitionTimeLimit": "will never start: {TimeLimit} is more than partition {Partition} allows",
    "PartitionNodeLimit": "will never start: partition {Partition} gives no job {NumNodes} nodes",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "NodeDown": "waits for a node that is down",
    "Reservation": "waits for its reservation",
    "BadConstraints": "will never start: no node is what it asks for",
    "Licenses": "waits for licences",
    "Cleaning": "waits for its last start to be cleared away",
    "launch failed requeued held": "could not be started on a node and is held: look at the node, "
    "then scontrol release {JobId}",
    "job requeued in held state": "is held after a requeue: scontrol release {JobId}",
}
_PREFIXES = {
    "QOS": "waits for the limits of its QOS ({Reason})",
    "Assoc": "waits for the limits of its account ({Reason})",
    "MaxMemPerLimit": "will never start: it asks for more memory than is allowed",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved ({Reason})",
}


@dataclass(frozen=True)
class JobStatus:
    """The SLURM job that looks after a run."""

    job: str
    state: str  # SLURM's word; "unknown" if it has forgotten the job or cannot be asked
    restarts: int
    nodes: str
    why: str  # a sentence without a subject

    def as_json(self) -> dict[str, Any]:
        """Return plain values for json.dumps."""
        return asdict(self)


def job_status(run_dir: Path, *, ask: Callable[[str], Job | None] = show_job) -> JobStatus | None:
    """Return how the job of a run stands; None if no job ever had it."""
    number = newest_job(run_dir)
    if number is None:
        return None
    job = ask(number)
    if job is None:
        why = "is not known to SLURM: it ended long ago, or the controller does not answer"
        return JobStatus(job=number, state="unknown", restarts=0, nodes="", why=why)
    return JobStatus(
        job=number, state=job.state, restarts=job.restarts, nodes=job["NodeList"], why=explain(job)
    )


def explain(job: Job) -> str:
    """Say what a job is doing, or why it is not."""
    state = job.state
    if state == "PENDING":
        return _explain_pending(job)
    if state == "RUNNING" and job.preempted:
        return f"has to leave for another job until {job['EndTime']}; it is queued again"
    words = {
        "RUNNING": f"runs on {job['NodeList']}, until {job['EndTime'] or 'no limit'} at most",
        "CONFIGURING": f"waits for its nodes {job['NodeList']} to boot",
        "COMPLETING": "is being cleared away",
        "SUSPENDED": "is suspended: scontrol resume " + job["JobId"],
        "COMPLETED": "has ended well",
        "CANCELLED": "was cancelled, and stays so; submit again to go on",
        "TIMEOUT": "reached its time limit before it could be queued again; submit again to go on",
        "NODE_FAIL": "lost a node and was not queued again; submit again to go on",
        "OUT_OF_MEMORY": "was ended for memory; submit again with more",
        "PREEMPTED": "was preempted and not queued again; submit again to go on",
    }
    if state == "FAILED":
        return _explain_failed(job["ExitCode"])
    return words.get(state, f"is {state.lower()}")


def _explain_pending(job: Job) -> str:
    reason = job["Reason"]
    fields: dict[str, str] = {
        name: job[name]
        for name in ("JobId", "Dependency", "Partition", "TimeLimit", "NumNodes", "Reason")
    }
    start = job["StartTime"]
    fields["begin"] = f" at {start}" if start else ""
    words = _WORDS.get(reason) or _WORDS.get(reason.replace("_", " "))
    if words is None:
        words = next((w for p, w in _PREFIXES.items() if reason.startswith(p)), None)
    if words is None:
        words = "waits ({Reason})" if reason else "waits to be looked at"
    text = words.format(**fields)
    if reason in ("Resources", "Priority") and start:
        text += f"; expected at {start}"
    return text


def _explain_failed(exit_code: str) -> str:
    code = exit_code.partition(":")[0]
    return {
        "93": "gave up after three attempts without a new checkpoint; see the rank's log, then "
        "submit again",
        "2": "was given something that has to be changed; its output says what",
        "75": "wanted to be queued again and SLURM refused; submit again to go on",
    }.get(code, f"failed with {exit_code}; see its output")
