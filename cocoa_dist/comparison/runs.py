"""Runs what is missing of a comparison, one run after the other, by the launcher.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
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
    """Signals of this call: passed on to the launcher, which saves and leaves."""

    number: int | None = None
    child: subprocess.Popen[bytes] | None = None

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal and pass it on."""
        self.number = number
        self.pass_on()

    def pass_on(self) -> None:
        """Tell the launcher, if a signal has come and it runs."""
        if self.number is not None and self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)

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


def run_cell(
    place: Place,
    cell: Cell,
    *,
    nproc: int,
    say: Say,
    signals: Signals,
    launcher: Sequence[str] = LAUNCHER,
) -> str | None:
    """Train one cell to its end; return None, or in a line why it failed.

    Raises InterruptedByUserError if a signal came.
    """
    failure = place.failure(cell.name, cell.seed)
    failure.unlink(missing_ok=True)
    run_dir = place.run(cell.name, cell.seed)
    total = sum(stage.steps for stage in cell.config.stages.values())
    code = _launch(
        command(place, cell, nproc=nproc, launcher=launcher),
        log=place.log(cell.name, cell.seed),
        tick=lambda: say(
            f"    {cell.name} seed {cell.seed}: step {steps_done(run_dir)} of {total}"
        ),
        signals=signals,
    )
    if code == 0 and is_done(run_dir, cell.config):
        return None
    why = _reason(place.log(cell.name, cell.seed), code)
    write_atomic(failure, f"{why}\n".encode())
    return why


def run_pilots(
    place: Place,
    variants: Sequence[Variant],
    costs: dict[str, StageCost],
    *,
    steps: int,
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
    for variant in variants:
        stages = unmeasured(variant.config, costs)
        if not stages:
            continue
        config = pilot_config(variant.config, stages, steps=steps)
        folder = place.root / "pilots" / variant.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f"{variant.name}.yaml")
        write_atomic(path, dump_yaml(config).encode())
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was killed: seconds of work
        say(f"  pilot of {variant.name}: {steps} steps of {', '.join(stages)}")
        log = place.root / "logs" / f"pilot-{variant.name}.log"
        words = [*launcher, str(path), "--run-dir", str(folder), "--nproc", str(nproc)]
        code = _launch(words, log=log, tick=lambda: None, signals=signals)
        if code != 0 or not is_done(folder, config):
            failed[variant.name] = f"its pilot failed: {_reason(log, code)}"
            continue
        for stage in stages:
            key = cost_key(variant.config, stage)
            costs[key] = measure(folder, arm=variant.name, stage=stage)
        keep()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return failed


def _launch(words: Sequence[str], *, log: Path, tick: Callable[[], None], signals: Signals) -> int:
    """Run a command to its end, its words in a log; it dies with this process."""
    signals.check()
    log.parent.mkdir(parents=True, exist_ok=True)
    told = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(
            list(words),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(_die_with, os.getpid()),
            start_new_session=True,  # a signal reaches it once, through `Signals`
        )
        signals.child = child
        signals.pass_on()  # it may have come while the child was being started
        try:
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
                if time.monotonic() - told > _TOLD_EVERY_SECONDS:
                    told = time.monotonic()
                    tick()
        finally:
            signals.child = None
            if child.poll() is None:
                child.kill()
                child.wait()
    signals.check()
    return child.returncode


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call above
        os._exit(1)


def _reason(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    said = [line.strip() for line in lines if line.strip()][-_LAST_LINES:]
    return f"exit code {code}: {' / '.join(said) or 'it said nothing'} (log: {log})"
