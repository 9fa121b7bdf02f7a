"""Runs what is missing of a comparison, by the launcher.

A run that fails is named and the others go on; killed at any moment, the same call goes on from
the last checkpoint. Nothing is kept in memory that the folder does not say.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from cocoa_dist.comparison.arms import Variant
from cocoa_dist.comparison.budget import (
    StageCost,
    cost_key,
    measure,
    pilot_config,
    unmeasured,
)
from cocoa_dist.comparison.folder import Place
from cocoa_dist.config import RunConfig, dump_yaml
from cocoa_dist.manifest import newest, write_atomic
from cocoa_dist.metrics import METRICS_NAME

LAUNCHER = (sys.executable, "-m", "launcher", "run")
_POLL_SECONDS = 0.2
_TOLD_EVERY_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LAST_LINES = 4

Say = Callable[[str], None]


class InterruptedByUserError(Exception):
    """A signal ended the call; `code` is its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; the same command goes on")
        self.code = 128 + number


@dataclass(frozen=True, eq=False)
class Cell:
    """One run: a row with a seed."""

    variant: Variant
    config: RunConfig  # with the steps it trains, seed 0
    seed: int
    cpu_seconds: float | None  # expected; None without pilots

    @property
    def name(self) -> str:
        """The row's name among all."""
        return self.config.name


@dataclass
class Signals:
    """Signals of this call: passed on to the launchers, which save and leave."""

    number: int | None = None
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal and pass it on."""
        self.number = number
        self.pass_on()

    def pass_on(self) -> None:
        """Tell the launchers that run, if a signal has come."""
        for child in self.children if self.number is not None else ():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raise InterruptedByUserError if a signal has come."""
        if self.number is not None:
            raise InterruptedByUserError(self.number)


@contextmanager
def caught_signals() -> Iterator[Signals]:
    """Catch SIGINT, SIGTERM and SIGHUP; call in the main thread."""
    signals = Signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signals.catch) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_done(run_dir: Path, config: RunConfig) -> bool:
    """Tell whether every stage of a run is finished."""
    ends = [newest(run_dir, stage=name) for name in config.stages]
    return all(end is not None and end[1].complete for end in ends)


def steps_done(run_dir: Path) -> int:
    """Return how many optimizer steps a run has logged."""
    path = run_dir / METRICS_NAME
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def command(place: Place, cell: Cell, *, nproc: int, launcher: Sequence[str]) -> list[str]:
    """Return the command that starts a run, or goes on with it."""
    recipe, run_dir = place.recipe(cell.name), place.run(cell.name, cell.seed)
    words = [str(recipe), f"seed={cell.seed}", "--run-dir", str(run_dir), "--nproc", str(nproc)]
    return [*launcher, *words]


@dataclass(frozen=True)
class Result:
    """How one cell ended; `why` it failed, or None."""

    cell: Cell
    why: str | None
    seconds: float


def run_cells(
    place: Place,
    cells: Sequence[Cell],
    *,
    jobs: int,
    nproc: int,
    say: Say,
    signals: Signals,
    launcher: Sequence[str] = LAUNCHER,
) -> Generator[Result, None, None]:
    """Train cells to their ends, `jobs` at a time in their order; yield each as it ends.

    Raises InterruptedByUserError if a signal came, once the launchers have saved and left.
    """
    waiting, active = list(cells), dict[Cell, _Child]()
    told = time.monotonic()
    try:
        while waiting or active:
            while waiting and len(active) < jobs and signals.number is None:
                cell = waiting.pop(0)
                place.failure(cell.name, cell.seed).unlink(missing_ok=True)
                words = command(place, cell, nproc=nproc, launcher=launcher)
                active[cell] = _Child(words, log=place.log(cell.name, cell.seed), signals=signals)
            if not active:
                signals.check()
            for cell in [cell for cell, child in active.items() if not child.runs()]:
                child = active.pop(cell)
                if signals.number is None:
                    yield _ended(place, cell, child)
            if time.monotonic() - told > _TOLD_EVERY_SECONDS:
                told = time.monotonic()
                for cell in active:
                    say(f"    {_progress(place, cell)}")
            time.sleep(_POLL_SECONDS if active else 0)
        signals.check()
    finally:
        for child in active.values():
            child.kill()


def _ended(place: Place, cell: Cell, child: "_Child") -> Result:
    seconds = time.monotonic() - child.began
    if child.code == 0 and is_done(place.run(cell.name, cell.seed), cell.config):
        return Result(cell, None, seconds)
    why = _reason(place.log(cell.name, cell.seed), child.code)
    write_atomic(place.failure(cell.name, cell.seed), f"{why}\n".encode())
    return Result(cell, why, seconds)


def _progress(place: Place, cell: Cell) -> str:
    total = sum(stage.steps for stage in cell.config.stages.values())
    done = steps_done(place.run(cell.name, cell.seed))
    return f"{cell.name}, seed {cell.seed}: step {done} of {total}"


def run_pilots(
    place: Place,
    variants: Sequence[Variant],
    costs: dict[str, StageCost],
    *,
    steps: int,
    rounds: int,
    nproc: int,
    say: Say,
    signals: Signals,
    keep: Callable[[], None],
    launcher: Sequence[str] = LAUNCHER,
) -> dict[str, str]:
    """Measure every stage that has not been; return arms that could not be, with the reason.

    `costs` grows, and `keep` writes that down after each pilot. A stage that two arms share is
    measured once. Raises InterruptedByUserError if a signal came.
    """
    failed: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for variant in variants:
            stages = unmeasured(variant.config, costs, rounds=number)
            if not stages or variant.name in failed:
                continue
            config = pilot_config(variant.config, stages, steps=steps)
            folder = place.root / "pilots" / variant.name
            folder.parent.mkdir(parents=True, exist_ok=True)
            path = folder.with_name(f"{variant.name}.yaml")
            write_atomic(path, dump_yaml(config).encode())
            shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed: seconds of work
            said = f"  pilot {number} of {rounds} of {variant.name}"
            say(f"{said}: {steps} steps of {', '.join(stages)}")
            log = place.root / "logs" / f"pilot-{variant.name}.log"
            words = [*launcher, str(path), "--run-dir", str(folder), "--nproc", str(nproc)]
            code = _launch(words, log=log, signals=signals)
            if code != 0 or not is_done(folder, config):
                failed[variant.name] = f"its pilot failed: {_reason(log, code)}"
                continue
            for stage in stages:
                key = cost_key(variant.config, stage)
                found = measure(folder, arm=variant.name, stage=stage)
                costs[key] = costs[key].with_round(found) if key in costs else found
            keep()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return failed


def _launch(words: Sequence[str], *, log: Path, signals: Signals) -> int:
    """Run a command to its end; return its exit code."""
    signals.check()
    child = _Child(words, log=log, signals=signals)
    try:
        while child.runs():
            time.sleep(_POLL_SECONDS)
    finally:
        child.kill()
    signals.check()
    return child.code


class _Child:
    """A launcher at work, its words in a log; it dies with this process, and hears its signals."""

    def __init__(self, words: Sequence[str], *, log: Path, signals: Signals) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.signals, self.began = signals, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_die_with, os.getpid()),
                start_new_session=True,  # a signal reaches it once, through `Signals`
            )
        signals.children.append(self.process)
        signals.pass_on()  # it may have come while the child was being started

    def runs(self) -> bool:
        """Say whether it still runs."""
        if self.process.poll() is None:
            return True
        if self.process in self.signals.children:
            self.signals.children.remove(self.process)
        return False

    @property
    def code(self) -> int:
        """Its exit code, once it has ended."""
        assert self.process.returncode is not None, "asked for children that have ended"
        return self.process.returncode

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.runs():
            self.process.kill()
            self.process.wait()
            self.runs()


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call above
        os._exit(1)


def _reason(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()][-_LAST_LINES:]
    return f"exit code {code}: {' / '.join(said) or 'it said nothing'} (log: {log})"
