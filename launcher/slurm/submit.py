"""`submit`: checks what can be checked on the login node, keeps it, and hands it to sbatch once."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cocoa_dist.config import RunConfig, load_recipe, recipe_path
from cocoa_dist.manifest import write_atomic
from launcher.backend import BadInputError
from launcher.run import check_num_processes
from launcher.runfolder import (
    RESOLVED_NAME,
    RunFolderError,
    check_usable,
    prepare,
    read_holder,
)
from launcher.slurm.cluster_file import ClusterFile, check_mounts, load_cluster_file
from launcher.slurm.codecopy import copy_code, running_code
from launcher.slurm.jobs import JOBS_NAME, SUBMIT_DIR, known_jobs
from launcher.slurm.render import JobRequest, num_tasks, render_job
from launcher.slurm.scheduler import job_state

_SBATCH_SECONDS = 60.0


@dataclass(frozen=True)
class Submission:
    """What was asked for on the command line."""

    recipe: str
    overrides: tuple[str, ...]
    run_dir: Path
    cluster_path: Path | None
    nodes: int | None = None
    per_stage: Mapping[str, int] | None = None  # stage to nodes: one job a stage


def render(submission: Submission) -> str:
    """Return the batch files that `submit` would write, one after the other; writes nothing."""
    _, cluster, requests = _plan(submission)
    texts = [render_job(request, cluster, checkout=running_code()) for request in requests]
    return "\n".join(texts)


def submit(
    submission: Submission, *, state_of: Callable[[str], str | None] = job_state
) -> list[str]:
    """Submit a run, as one job or one a stage; return the job ids.

    Raises ConfigError, BadInputError or RunFolderError for what has to be changed, with sbatch's
    own words if it refuses; then nothing is in the queue.
    """
    config, cluster, requests = _plan(submission)
    run_dir = requests[0].run_dir
    check_usable(run_dir)
    if shutil.which("sbatch") is None:
        raise BadInputError("there is no sbatch here: submit from a login node of the cluster")
    with _submitting(run_dir):
        _refuse_live_job(run_dir, state_of=state_of)
        folder = run_dir / SUBMIT_DIR
        code = copy_code(run_dir)
        jobs: list[str] = []
        for request in requests:
            last = jobs[-1:]
            options = [f"--dependency=afterok:{job}" for job in last]
            options += ["--kill-on-invalid-dep=yes"] if last else []
            path = folder / f"{len(known_jobs(run_dir)):03d}.sbatch"
            kept = _keep_inputs(request, config, recipe=submission.recipe)
            text = render_job(kept, cluster, checkout=running_code(), code=code)
            write_atomic(path, text.encode())
            jobs.append(_sbatch(path, options, earlier=jobs))
            with (folder / JOBS_NAME).open("a", encoding="utf-8") as file:
                file.write(f"{jobs[-1]}\n")
    return jobs


def _plan(submission: Submission) -> tuple[RunConfig, ClusterFile, list[JobRequest]]:
    config = load_recipe(submission.recipe, submission.overrides)
    cluster = load_cluster_file(submission.cluster_path)
    run_dir = submission.run_dir.expanduser().absolute()
    check_mounts(cluster, run_dir=run_dir)
    recipe = submission.recipe
    if Path(recipe).suffix in (".yaml", ".yml"):
        recipe = str(Path(recipe).absolute())
    wanted = submission.per_stage or {"": submission.nodes or cluster.nodes}
    unknown = [stage for stage in wanted if stage and stage not in config.stages]
    if unknown:
        raise BadInputError(
            f"'{unknown[0]}' is not a stage of {config.name} (have: {', '.join(config.stages)})"
        )
    stages = list(config.stages) if submission.per_stage else [""]
    requests = [
        JobRequest(
            name=f"cocoa-{run_dir.name}" + (f"-{stage}" if stage else ""),
            recipe=recipe,
            run_dir=run_dir,
            cluster_path=submission.cluster_path and submission.cluster_path.absolute(),
            overrides=submission.overrides,
            nodes=wanted.get(stage, submission.nodes or cluster.nodes),
            until=stage or None,
        )
        for stage in stages
    ]
    for request in requests:
        check_num_processes(
            config, num_processes=num_tasks(request, cluster), option="a number of tasks of"
        )
    return config, cluster, requests


def _keep_inputs(request: JobRequest, config: RunConfig, *, recipe: str) -> JobRequest:
    """Make the run folder; what is edited while the job waits does not reach it."""
    run_dir = request.run_dir
    prepare(run_dir, config=config, recipe_file=recipe_path(recipe))
    (run_dir / "logs").mkdir(exist_ok=True)
    kept = None
    if request.cluster_path is not None:
        kept = run_dir / SUBMIT_DIR / "cluster.yaml"
        shutil.copyfile(request.cluster_path, kept)
    return replace(request, recipe=str(run_dir / RESOLVED_NAME), cluster_path=kept, overrides=())


def _refuse_live_job(run_dir: Path, *, state_of: Callable[[str], str | None]) -> None:
    holder = read_holder(run_dir)
    jobs = set(known_jobs(run_dir)[-8:]) | ({holder.job} if holder and holder.job else set())
    for job in sorted(jobs, key=int, reverse=True):
        state = state_of(job)
        if state:
            raise RunFolderError(
                f"{run_dir} belongs to job {job} ({state}); nothing was submitted. Let that job go "
                f"on, or end it first: scancel {job}"
            )


def _sbatch(path: Path, options: Sequence[str], *, earlier: Sequence[str]) -> str:
    """Hand a file to sbatch; takes back the jobs before it if it is refused."""
    command = ["sbatch", "--parsable", *options, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_SBATCH_SECONDS, check=False
    )
    if done.returncode == 0:
        return done.stdout.strip().partition(";")[0]
    for job in earlier:
        subprocess.run(["scancel", job], capture_output=True, check=False)
    said = done.stderr.strip().removeprefix("sbatch: error: ") or f"exit code {done.returncode}"
    raise BadInputError(f"sbatch refused {path}: {said}")


@contextmanager
def _submitting(run_dir: Path) -> Iterator[None]:
    """Let one submission at a time look and act."""
    (run_dir / SUBMIT_DIR).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / SUBMIT_DIR / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
