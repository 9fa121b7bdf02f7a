"""Which SLURM jobs have a run: `submit/jobs` in the run folder, and whoever holds it."""

from pathlib import Path

from launcher.runfolder import read_holder

SUBMIT_DIR = "submit"
JOBS_NAME = "jobs"  # in submit/: one job id a line


def newest_job(run_dir: Path) -> str | None:
    """Return the job that looks after a run: the one that holds it, else the next submitted one."""
    holder = read_holder(run_dir)
    jobs = known_jobs(run_dir)
    if holder is not None and holder.job is not None and holder.job not in jobs[:-1]:
        return holder.job
    return jobs[-1] if jobs else None


def known_jobs(run_dir: Path) -> list[str]:
    """Return the jobs that `launcher submit` has queued, in their order."""
    try:
        return (run_dir / SUBMIT_DIR / JOBS_NAME).read_text(encoding="utf-8").split()
    except OSError:
        return []
