"""Many runs at once: one row for each run below a folder, those that need somebody first."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cocoa_dist.config import ConfigError
from launcher.live import View, read_view
from launcher.progress import duration
from launcher.runfolder import RunFolderError
from launcher.slurm.commands import run_folders
from launcher.slurm.explain import JobStatus, job_status
from launcher.table import STATE_STYLES

_ORDER = ("stalled", "given_up", "running", "preempted", "pending", "stopped", "done")
_COLUMNS = ("done", "loss", "steps/s", "left", "goodput", "restarts", "last step")
_WIDE, _NARROW_COLUMNS = 110, 4
_JOB_SECONDS = 30.0  # between two questions to SLURM's controller about one run
_MOST_LOAD = 0.2  # of one core


@dataclass(frozen=True)
class Row:
    """One run: how it stands, or why that cannot be read."""

    run_dir: Path
    view: View | None
    fault: str = ""


class Jobs:
    """Asks SLURM about the jobs of runs, not more often than it likes."""

    def __init__(self, ask: Callable[[Path], JobStatus | None] = job_status) -> None:
        self._ask = ask
        self._known: dict[Path, tuple[float, JobStatus | None]] = {}

    def of(self, run_dir: Path) -> JobStatus | None:
        """Return how the job of a run stood at most half a minute ago; None if it has none."""
        asked, job = self._known.get(run_dir, (-_JOB_SECONDS, None))
        if time.monotonic() - asked >= _JOB_SECONDS:
            job = self._ask(run_dir)
            self._known[run_dir] = (time.monotonic(), job)
        return job


def read_rows(folder: Path, *, jobs: Jobs, now: float) -> list[Row]:
    """Read all runs at and below a folder, in the order in which they are shown.

    Raises RunFolderError if `folder` is no folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder: expected one with runs below it")
    rows = []
    for run_dir in run_folders(folder):
        try:
            rows.append(Row(run_dir, read_view(run_dir, job=jobs.of(run_dir), now=now)))
        except (ConfigError, RunFolderError, OSError, ValueError) as error:
            rows.append(Row(run_dir, None, " ".join(str(error).split())))
    return sorted(rows, key=lambda row: (_place(row), str(row.run_dir)))


def draw(rows: list[Row], *, folder: Path, width: int) -> RenderableType:
    """Draw the table; in a narrow terminal without its last columns."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("stage", overflow="fold")
    shown = _COLUMNS if width >= _WIDE else _COLUMNS[:_NARROW_COLUMNS]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        name = str(row.run_dir.relative_to(folder)) if row.run_dir != folder else row.run_dir.name
        if row.view is None:
            table.add_row(Text(name), Text("unreadable", style="red"), Text(row.fault))
            continue
        state = row.view.status.state
        style = STATE_STYLES.get(state, "")
        table.add_row(
            Text(name), Text(state, style=style), *map(Text, _cells(row.view)[: len(shown) + 1])
        )
    if not rows:
        return Text(f"no run folders at or below {folder}")
    return table


def top(folder: Path, console: Console, *, every: float = 5.0, once: bool = False) -> None:
    """Show all runs until Ctrl-C; once without a terminal or with `once`.

    Raises RunFolderError if `folder` is no folder.
    """
    jobs = Jobs()
    if once or not console.is_terminal:
        rows = read_rows(folder, jobs=jobs, now=time.time())
        console.print(draw(rows, folder=folder, width=console.width))
        return
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
    try:
        live.start()
        while True:
            began = time.monotonic()
            rows = read_rows(folder, jobs=jobs, now=time.time())
            live.update(draw(rows, folder=folder, width=console.width), refresh=True)
            time.sleep(max(every, (time.monotonic() - began) / _MOST_LOAD))
    except KeyboardInterrupt:
        pass  # the last picture stays, the runs go on
    finally:
        live.stop()


def _cells(view: View) -> list[str]:
    status, running = view.status, view.status.state in ("running", "stalled")
    steps = sum(stage.step for stage in status.stages)
    target = sum(stage.target_step for stage in status.stages)
    rate = view.rates.steps if running else None
    left = status.eta_seconds if status.state == "running" else None
    ago = None if view.last_step_at is None else max(0.0, view.now - view.last_step_at)
    return [
        f"{status.stage} {status.step}/{status.target_step}",
        f"{steps / target:.0%}",
        f"{view.losses[-1]:.4g}" if view.losses else "-",
        "-" if rate is None else f"{rate:.3g}",
        "-" if left is None else duration(left),
        "-" if status.goodput is None else f"{status.goodput:.0%}",
        str(sum(status.restarts.values())),
        "-" if ago is None else f"{duration(ago)} ago",
    ]


def _place(row: Row) -> int:
    return _ORDER.index(row.view.status.state) if row.view else -1
