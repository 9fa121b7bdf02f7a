"""Draws the status of a run as a table."""

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.progress import duration
from launcher.runfolder import RESOLVED_NAME, stop_note, timestamp
from launcher.slurm.explain import JobStatus
from launcher.status import BestCheckpoint, Status

STATE_STYLES = {
    "done": "green",
    "running": "green",
    "stalled": "bold red",
    "given_up": "bold red",
    "preempted": "yellow",
    "stopped": "yellow",
}


def show_status(
    console: Console, status: Status, *, run_dir: Path, job: JobStatus | None = None
) -> None:
    """Print facts and stages of a run, and how its SLURM job stands if it has one."""
    console.print(Group(_facts(status, run_dir=run_dir, job=job), _stages(status)))


def _facts(status: Status, *, run_dir: Path, job: JobStatus | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    state = Text(status.state, style=STATE_STYLES.get(status.state, ""))
    grid.add_row("run", Text(f"{status.run} (recipe {status.recipe})"))
    grid.add_row("state", state)
    if job is not None:
        grid.add_row("job", Text(f"{job.job} ({job.state}) {job.why}"))
    note = stop_note(run_dir)
    if note is not None:
        grid.add_row("STOP", Text(note))
    grid.add_row("stage", Text(f"{status.stage}, step {status.step} of {status.target_step}"))
    grid.add_row("incarnation", Text(status.epoch or "none yet"))
    restarts = ", ".join(f"{number} {reason}" for reason, number in status.restarts.items())
    grid.add_row("restarts", Text(restarts or "none"))
    grid.add_row("replayed", Text(f"{status.replayed_steps} steps"))
    wall = sum(status.seconds.values())
    if status.goodput is not None:
        grid.add_row("goodput", Text(f"{status.goodput:.1%} of {duration(wall)}"))
    for cause, spent in status.seconds.items():
        if spent > 0:
            grid.add_row("", Text(f"{cause} {duration(spent)}, {spent / wall:.1%}"))
    last = status.last_checkpoint
    if last is not None:
        age = duration(last.age_seconds)
        grid.add_row("checkpoint", Text(f"{last.stage}, step {last.step}, {age} old"))
    for stage in status.stages:
        if stage.best is not None:
            grid.add_row("best", Text(f"{stage.stage}, {best_words(stage.best)}"))
    if status.eta_seconds is not None and status.state == "running":
        grid.add_row("time left", Text(f"about {duration(status.eta_seconds)}"))
    grid.add_row("quarantined", Text(_quarantined(status)))
    if status.loader_restarts:
        grid.add_row("loaders", Text(f"{status.loader_restarts} started again (loader_deaths/)"))
    grid.add_row("begun", Text(timestamp((run_dir / RESOLVED_NAME).stat().st_mtime)))
    return grid


def best_words(best: BestCheckpoint) -> str:
    """Say which checkpoint is best, and by what."""
    return f"step {best.step}: {best.measure} {best.value:.4g}"


def _quarantined(status: Status) -> str:
    """Say how often records could not be used, and why."""
    if not status.quarantined:
        return "none"
    kinds = ", ".join(f"{count} {kind}" for kind, count in status.quarantined.items())
    return f"{sum(status.quarantined.values())} uses of records: {kinds}"


def _stages(status: Status) -> RenderableType:
    table = Table("stage", "state", "step", "of", "loss", "wall time")
    for column in table.columns[2:]:
        column.justify = "right"
    for stage in status.stages:
        loss = ", ".join(f"{name} {value:.4g}" for name, value in stage.loss.items())
        table.add_row(
            stage.stage,
            stage.state,
            str(stage.step),
            str(stage.target_step),
            loss or "-",
            duration(stage.wall_seconds) if stage.wall_seconds else "-",
        )
    return table
