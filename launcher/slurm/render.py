"""The batch file of a run: what `submit` hands to sbatch and `render` prints."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm.cluster_file import ClusterFile

PIPELINE = "slurm/cocoa_pipeline.sh"


@dataclass(frozen=True)
class JobRequest:
    """One job of a run: all stages, or up to one of them."""

    name: str
    recipe: str
    run_dir: Path  # absolute
    cluster_path: Path | None  # absolute
    overrides: tuple[str, ...] = ()
    nodes: int | None = None  # default: the cluster file's
    until: str | None = None  # stage after which the job ends


def render_job(
    request: JobRequest, cluster: ClusterFile, *, checkout: Path, code: Path | None = None
) -> str:
    """Return the batch file; `code` is the copy to run, default the checkout itself."""
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH {_quoted(option)}" for option in sbatch_options(request, cluster)]
    words = [f"recipe={request.recipe}", f"run_dir={request.run_dir}"]
    words += [f"cluster={request.cluster_path}"] if request.cluster_path else []
    words += [f"until={request.until}"] if request.until else []
    words += request.overrides
    root = checkout if code is None else code
    lines += [
        f"# Written by `python -m launcher`; run folder: {request.run_dir}",
        "set -u",
        f"export COCOA_ROOT={shlex.quote(str(checkout))}",
        *([f"export COCOA_CODE={shlex.quote(str(code))}"] if code else []),
        _continued(["exec", "bash", str(root / PIPELINE), *words]),
    ]
    return "\n".join(lines) + "\n"


def sbatch_options(request: JobRequest, cluster: ClusterFile) -> list[str]:
    """Return the options of sbatch, in a fixed order."""
    tasks = cluster.gpus_per_node or cluster.tasks_per_node
    named = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "nodes": request.nodes or cluster.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": cluster.gpus_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        "time": cluster.time,
        "exclude": ",".join(cluster.exclude) or None,
    }
    return [
        f"--job-name={request.name}",
        *(f"--{name}={value}" for name, value in named.items() if value is not None),
        *(["--exclusive"] if cluster.exclusive else []),
        f"--output={str(request.run_dir).replace('%', '%%')}/logs/job-%j.out",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR2@{cluster.signal_seconds}",
        *cluster.more,
    ]


def num_tasks(request: JobRequest, cluster: ClusterFile) -> int:
    """Return the number of ranks a job will have."""
    tasks = cluster.gpus_per_node or cluster.tasks_per_node or 1
    return (request.nodes or cluster.nodes) * tasks


def _quoted(option: str) -> str:
    """Quote an option the way sbatch reads it in a comment."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if equals and " " in value else option


def _continued(words: Sequence[str]) -> str:
    """Join quoted words, one a line after the first three."""
    quoted = [shlex.quote(word) for word in words]
    return " \\\n    ".join([" ".join(quoted[:3]), *quoted[3:]])
