"""`run --backend slurm`: the launcher inside the batch job it belongs to."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launcher.progress import say
from launcher.run import RunRequest, run
from launcher.runfolder import is_run_folder
from launcher.slurm.allocation import read_allocation
from launcher.slurm.backend import SlurmBackend
from launcher.slurm.cluster_file import check_mounts, load_cluster_file
from launcher.slurm.codecopy import copy_code, moved_on, remember_code
from launcher.slurm.jobs import SUBMIT_DIR
from launcher.slurm.scheduler import submitted_at
from launcher.slurm.submission import record_submission


def run_in_job(request: RunRequest, *, console: Console, cluster_path: Path | None) -> int:
    """Start a run, or go on with it, on the nodes of this job; return the exit code.

    Raises what `run` raises, and BadInputError for the cluster file or outside of a job.
    """
    cluster = load_cluster_file(cluster_path)
    check_mounts(cluster, run_dir=request.run_dir.expanduser().absolute())
    allocation = read_allocation(tasks_per_node=cluster.tasks_per_node)

    @contextlib.contextmanager
    def keep(run_dir: Path) -> Iterator[Path]:
        """Keep what a later start of the job needs; give the code that ranks run."""
        code = copy_code(run_dir)
        remember_code(run_dir, code, job=allocation.job)
        record_submission(run_dir, allocation)
        kept = run_dir / SUBMIT_DIR / f"{allocation.job}.cluster.yaml"
        if cluster_path is not None and not kept.exists():
            shutil.copyfile(cluster_path, kept)
        checkout = Path(os.environ.get("COCOA_ROOT") or code)
        if moved_on(checkout, code):
            say(console, f"{checkout} has moved on since this job was submitted: running {code}")
        yield code

    if allocation.overcommit:
        few = f"{allocation.tasks_per_node} ranks share fewer CPUs on a node; ask for more with "
        say(console, few + "--cpus-per-task, --cpus-per-gpu or --exclusive")
    backend = SlurmBackend(
        allocation=allocation, cluster=cluster, say=lambda text: say(console, text), keep=keep
    )
    if not is_run_folder(request.run_dir.expanduser().absolute()):
        request = replace(request, submitted_at=submitted_at(allocation.job))
    return run(request, console=console, backend=backend)
