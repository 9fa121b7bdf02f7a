"""The allocation of a SLURM job, as its batch script sees it: nodes, tasks, identity."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.backend import BadInputError
from launcher.slurm.hostlist import expand_counts, expand_hosts

_FIRST_PORT, _PORTS = 20000, 12000  # below the ports that Linux gives to clients
_STRIDE = 7


@dataclass(frozen=True)
class Allocation:
    """What a job was given; `job` and `restart` name this start of it."""

    job: str
    restart: int  # how often it was queued again before
    requeue_id: str  # what `scontrol requeue` wants: of an array, this task alone
    nodes: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int | None
    overcommit: bool = False  # fewer CPUs than ranks on a node

    @property
    def num_tasks(self) -> int:
        """Number of ranks."""
        return len(self.nodes) * self.tasks_per_node

    @property
    def name(self) -> str:
        """Return JOB.RESTART, the start of each of its epochs."""
        return f"{self.job}.{self.restart}"

    def port(self, *, attempt: int) -> int:
        """Return a port for the ranks to meet at, another one for each attempt.

        Checked to be free where that can be done: on the first node, where batch scripts run.
        """
        number = int("".join(filter(str.isdigit, self.job)) or 0)
        first = number * 97 + self.restart * 31 + attempt * _STRIDE
        here = socket.gethostname().split(".")[0] == self.nodes[0].split(".")[0]
        for offset in range(_PORTS):
            port = _FIRST_PORT + (first + offset) % _PORTS
            if not here or _is_free(port):
                return port
        raise OSError(f"no free port on {self.nodes[0]} in {_FIRST_PORT}..{_FIRST_PORT + _PORTS}")


def read_allocation(
    environment: Mapping[str, str] = os.environ, *, tasks_per_node: int | None = None
) -> Allocation:
    """Read the allocation that this process runs in.

    Tasks: what was asked for (`--ntasks`, `--ntasks-per-node`), else one for each GPU, else
    `tasks_per_node` of the cluster file, else one a node. Raises BadInputError outside of a job, or
    if nodes would get different numbers of tasks.
    """
    job = environment.get("SLURM_JOB_ID", "")
    nodes_text = environment.get("SLURM_JOB_NODELIST", "")
    if not job or not nodes_text:
        raise BadInputError(
            "--backend slurm works inside a SLURM job only (SLURM_JOB_ID is not set); submit one: "
            "sbatch slurm/cocoa_pipeline.sh recipe=NAME run_dir=DIR"
        )
    nodes = expand_hosts(nodes_text)
    tasks = _tasks_per_node(environment, nodes=nodes, default=tasks_per_node)
    cpus = environment.get("SLURM_JOB_CPUS_PER_NODE")
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return Allocation(
        job=job,
        restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
        requeue_id=f"{array}_{task}" if array and task else job,
        nodes=nodes,
        tasks_per_node=tasks,
        cpus_per_task=int(environment.get("SLURM_CPUS_PER_TASK") or 0) or None,
        overcommit=cpus is not None and min(expand_counts(cpus)) < tasks,
    )


def _tasks_per_node(
    environment: Mapping[str, str], *, nodes: tuple[str, ...], default: int | None
) -> int:
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if environment.get("SLURM_NTASKS"):
        counts = set(expand_counts(environment.get("SLURM_TASKS_PER_NODE", "")))
        if len(counts) > 1:
            raise BadInputError(
                f"nodes would get different numbers of tasks "
                f"({environment['SLURM_TASKS_PER_NODE']}): ask for --ntasks-per-node instead"
            )
        tasks = counts.pop()
    else:
        tasks = gpus or default or 1
    if gpus and tasks > gpus:
        raise BadInputError(
            f"{tasks} tasks a node would share {gpus} GPUs on {nodes[0]}; ask for "
            f"--ntasks-per-node={gpus}, or for more GPUs"
        )
    return tasks


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
