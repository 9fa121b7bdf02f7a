"""The live view of one run: stages, rates, loss, goodput, and what happened last.

Reads the run folder as `status` does and writes nothing. Without a terminal it prints a line when
something has changed. It ends by itself when the run is over; Ctrl-C ends it and not the run.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cocoa_dist.timeline import Moment, MomentKind, read_timeline
from launcher.progress import duration, say
from launcher.runfolder import stop_note
from launcher.slurm.explain import JobStatus, job_status
from launcher.status import Status, read_status
from launcher.steplog import StepRecord, newest_first
from launcher.table import STATE_STYLES, best_words

OVER = ("done", "stopped", "given_up")  # nothing happens before somebody acts
_STEPS = 600  # newest ones, for the curve
_RATE_STEPS = 50
_MOMENTS = 6
_JOB_SECONDS = 15.0  # between two questions to SLURM's controller
_MOST_LOAD = 0.2  # of one core: a long history is read less often
_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_PLAIN_BARS = "_.-~=+*#"
_MOMENT_STYLES = {
    MomentKind.FAILED: "red",
    MomentKind.SAVE_FAILED: "red",
    MomentKind.INTERRUPTED: "yellow",
    MomentKind.FINISHED: "green",
}


@dataclass(frozen=True)
class Rates:
    """How fast the newest steps were; what is not known is None."""

    steps: float | None = None  # a second
    samples: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class View:
    """Everything that is drawn."""

    status: Status
    job: JobStatus | None
    stop: str | None  # what the STOP file says
    losses: tuple[float, ...]  # of the stage at work, oldest first
    rates: Rates
    moments: tuple[Moment, ...]  # the newest ones, oldest first
    now: float
    last_step_at: float | None = None  # seconds since 1970


def read_view(run_dir: Path, *, job: JobStatus | None = None, now: float) -> View:
    """Read all that is drawn. Raises RunFolderError, ConfigError as read_status does."""
    live = job is not None and job.state in ("RUNNING", "COMPLETING")
    status = read_status(run_dir, held_elsewhere=live, now=lambda: now)
    newest = list(islice(newest_first(run_dir), _STEPS))[::-1]
    shown = [line for line in newest if line.stage == newest[-1].stage] if newest else []
    return View(
        status=status,
        job=job,
        stop=stop_note(run_dir),
        losses=tuple(line.loss for line in shown if line.loss is not None),
        rates=rates_of(shown),
        moments=tuple(read_timeline(run_dir, whole=False)[-_MOMENTS:]),
        now=now,
        last_step_at=newest[-1].time if newest else None,
    )


def rates_of(records: Sequence[StepRecord]) -> Rates:
    """Return the rates over the newest steps of one incarnation, oldest first."""
    recent = [line for line in records[-_RATE_STEPS:] if line.epoch == records[-1].epoch]
    seconds = recent[-1].time - recent[0].time if len(recent) > 1 else 0.0
    if seconds <= 0:
        return Rates()
    done = recent[1:]  # the first one's work was done before its time
    return Rates(
        steps=len(done) / seconds,
        samples=sum(line.samples for line in done) / seconds or None,
        tokens=sum(line.tokens for line in done) / seconds or None,
    )


def sparkline(values: Sequence[float], *, width: int, bars: str = _BARS) -> str:
    """Draw values in one line of text; a place holds the median of the values it stands for."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    if count == 0:
        return ""
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    places = [statistics.median(finite[a:b]) for a, b in pairwise(edges)]
    low, high = min(places), max(places)
    span = (high - low) or 1.0
    return "".join(bars[round((len(bars) - 1) * (value - low) / span)] for value in places)


def draw(view: View, *, width: int, plain: bool = False) -> RenderableType:
    """Draw a view; `plain`: for terminals that know ASCII only."""
    return Group(_head(view), _stages(view.status), _facts(view, width, plain), _moments(view))


def watch(
    run_dir: Path,
    console: Console,
    *,
    every: float = 1.0,
    ask_job: Callable[[Path], JobStatus | None] = job_status,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it is over or Ctrl-C; `every`: seconds between two looks, at least.

    Raises RunFolderError if it is not a run folder, ConfigError if its recipe cannot be read.
    """
    job, asked = ask_job(run_dir), clock()
    view = read_view(run_dir, job=job, now=clock())
    plain = not console.encoding.lower().startswith("utf")
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
    said = ""
    try:
        if console.is_terminal:
            live.start()
        while True:
            began = time.monotonic()
            if clock() - asked >= _JOB_SECONDS:
                job, asked = ask_job(run_dir), clock()
            view = read_view(run_dir, job=job, now=clock())
            if console.is_terminal:
                live.update(draw(view, width=console.width, plain=plain), refresh=True)
            elif (line := in_one_line(view)) != said:
                said = line
                say(console, line)
            if view.status.state in OVER:
                break
            sleep(max(every, (time.monotonic() - began) / _MOST_LOAD))
    except KeyboardInterrupt:
        pass  # the last picture stays, and the run goes on
    finally:
        live.stop()
    if not console.is_terminal:
        console.print(draw(view, width=console.width, plain=plain))


def in_one_line(view: View) -> str:
    """Return the view in one line, for logs."""
    status = view.status
    facts = [status.state, f"{status.stage} {status.step}/{status.target_step}"]
    if view.losses:
        facts.append(f"loss {view.losses[-1]:.4g}")
    if status.state == "running" and view.rates.steps is not None:
        facts.append(f"{view.rates.steps:.2f} steps/s")
    if status.state == "running" and status.eta_seconds is not None:
        facts.append(f"{duration(status.eta_seconds)} left")
    return f"{status.run}: {', '.join(facts)}"


def _head(view: View) -> RenderableType:
    status = view.status
    line = Text.assemble(
        (status.run, "bold"),
        f"  recipe {status.recipe}  ",
        (status.state, STATE_STYLES.get(status.state, "")),
    )
    if view.job is not None:
        line.append(f"\njob {view.job.job} {view.job.why}")
    if view.stop is not None:
        line.append(f"\nSTOP: {view.stop}", style="yellow")
    return line


def _stages(status: Status) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=False)
    for stage in status.stages:
        bar = ProgressBar(total=stage.target_step, completed=stage.step, width=30)
        loss = ", ".join(f"{name} {value:.4g}" for name, value in stage.loss.items())
        done = f"{stage.step}/{stage.target_step}"
        grid.add_row(Text(stage.stage), bar, Text(done, justify="right"), Text(loss))
    return grid


def _facts(view: View, width: int, plain: bool) -> RenderableType:
    status, rates = view.status, view.rates
    grid = Table.grid(padding=(0, 2))
    if view.losses:
        curve = sparkline(
            view.losses, width=max(10, width - 24), bars=_PLAIN_BARS if plain else _BARS
        )
        grid.add_row("loss", Text(f"{view.losses[-1]:.4g}  {curve}", no_wrap=True))
    if rates.steps is not None:
        parts = [f"{rates.steps:.3g} steps/s"]
        parts += [f"{rates.samples:,.0f} samples/s"] if rates.samples else []
        parts += [f"{rates.tokens:,.0f} tokens/s"] if rates.tokens else []
        grid.add_row("rate", Text(", ".join(parts)))
    if status.eta_seconds is not None and status.state == "running":
        grid.add_row("time left", Text(f"about {duration(status.eta_seconds)}"))
    wall = sum(status.seconds.values())
    if status.goodput is not None and wall > 0:
        lost = sorted(
            ((spent, cause) for cause, spent in status.seconds.items() if cause != "productive"),
            reverse=True,
        )
        words = ", ".join(f"{cause} {spent / wall:.1%}" for spent, cause in lost[:3] if spent > 0)
        grid.add_row("goodput", Text(f"{status.goodput:.1%} of {duration(wall)}; {words}"))
    restarts = ", ".join(f"{number} {reason}" for reason, number in status.restarts.items())
    if restarts:
        grid.add_row("restarts", Text(f"{restarts}; {status.replayed_steps} steps done again"))
    if status.last_checkpoint is not None:
        last = status.last_checkpoint
        age = duration(last.age_seconds)
        grid.add_row("checkpoint", Text(f"{last.stage}, step {last.step}, {age} old"))
    current = next((stage for stage in status.stages if stage.stage == status.stage), None)
    if current is not None and current.best is not None:
        grid.add_row("best", Text(best_words(current.best)))
    if status.loader_restarts:
        told = f"{status.loader_restarts} started again, see loader_deaths/"
        grid.add_row("loaders", Text(told, style="yellow"))
    if status.quarantined:
        kinds = ", ".join(f"{count} {kind}" for kind, count in status.quarantined.items())
        grid.add_row("left out", Text(kinds, style="yellow"))
    return grid


def _moments(view: View) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for moment in view.moments:
        ago = f"{duration(max(0.0, view.now - moment.time))} ago"
        where = f"{moment.stage} step {moment.step}" if moment.stage else ""
        grid.add_row(
            Text(ago, justify="right", style="dim"),
            Text(moment.kind.value, style=_MOMENT_STYLES.get(moment.kind, "")),
            Text(where),
            Text(moment.text, overflow="ellipsis", no_wrap=True),
        )
    return grid
