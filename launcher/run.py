"""Executes a recipe in a run folder: stage after stage, crash after crash, until it is over.

It keeps no state between incarnations: what comes next is read from the folder each time.
"""

import math
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cocoa_dist.config import RunConfig, load_recipe, recipe_path
from launcher.advance import Done, Start, Stopped, decide, position
from launcher.backend import Backend, BadInputError, Ending, Order
from launcher.history import (
    SupersededError,
    Verdict,
    end_incarnation,
    end_lost_incarnations,
    read_incarnations,
    start_incarnation,
)
from launcher.progress import Display, duration, say
from launcher.run_metrics import RunExporter
from launcher.runfolder import STOP_NAME, check_usable, note_launch, prepare
from launcher.signals import Interrupts
from launcher.steplog import Follower

GIVEN_UP_CODE = 93  # NVIDIA's resiliency tools use it for "do not restart"
REQUEUE_CODE = 75  # EX_TEMPFAIL: interrupted; the batch script queues the job again
SUPERSEDED_CODE = 76  # another start of the job has the run
MAX_ATTEMPTS = 3  # in a row without a new checkpoint
_TOLD_CODES = (128 + signal.SIGTERM, 128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
_GO_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class RunRequest:
    """What was asked for on the command line."""

    recipe: str  # name or path
    overrides: tuple[str, ...]
    run_dir: Path
    until: str | None = None  # stage after which to leave, with 0
    began: float | None = None  # when the launcher was started, in seconds since 1970; None: now
    submitted_at: float | None = None  # in seconds since 1970; None: when it was started


def run(request: RunRequest, *, console: Console, backend: Backend) -> int:
    """Start a run or go on with it; return the exit code of the command.

    Raises ConfigError, RunFolderError or BadInputError for what the caller has to change; unless
    it was a rank that found it, nothing has been written then.
    """
    began = time.time() if request.began is None else request.began
    config = load_recipe(request.recipe, request.overrides)
    if request.until is not None and request.until not in config.stages:
        raise BadInputError(
            f"--until {request.until} is not a stage of {config.name} "
            f"(have: {', '.join(config.stages)})"
        )
    check_num_processes(config, num_processes=backend.world_size, option=backend.size_option)
    run_dir = request.run_dir.expanduser().absolute()
    check_usable(run_dir)
    new = not read_incarnations(run_dir)
    if new and not check_inputs(request, trainer=backend.check_command):
        say(console, "told to leave while looking at the inputs; to be queued again")
        return REQUEUE_CODE
    with Interrupts() as interrupts, backend.hold(run_dir):
        adopted = prepare(
            run_dir,
            config=config,
            recipe_file=recipe_path(request.recipe),
            submitted_at=min(began, request.submitted_at or began),
        )
        note_launch(run_dir, at=began)
        for line in adopted:
            say(console, f"changed since the last start: {line}")
        for item in end_lost_incarnations(run_dir):
            say(console, f"the last launcher was killed in stage {item.stage} ({item.epoch})")
        with RunExporter(config, run_dir, interrupts=interrupts) as exporter:
            session = _Session(
                config=config,
                run_dir=run_dir,
                backend=backend,
                console=console,
                interrupts=interrupts,
                until=request.until,
                exporter=exporter,
            )
            try:
                return session.go()
            except SupersededError as error:
                say(console, str(error))
                return SUPERSEDED_CODE


def check_inputs(request: RunRequest, *, trainer: tuple[str, ...]) -> bool:
    """Let the trainer look at data and model on disk, before anything is written.

    Returns False if SLURM's signal ended it before it could answer (srun says 128 + N then).
    Raises BadInputError with its message if something is missing or truncated.
    """
    command = [*trainer, request.recipe, *request.overrides, "--check-inputs"]
    looked = subprocess.run(command, capture_output=True, text=True, check=False)
    if trainer[0] == "srun" and looked.returncode in _TOLD_CODES:
        return False
    if looked.returncode:
        said = looked.stderr.strip().splitlines()
        lines = [line for line in said if not line.startswith("srun: error: ")] or said
        lines = lines or [f"exit code {looked.returncode}"]
        begin = next((i for i, line in enumerate(lines) if line.startswith("error: ")), -1)
        raise BadInputError("\n".join(lines[begin:]).removeprefix("error: "))
    return True


def check_num_processes(config: RunConfig, *, num_processes: int, option: str = "--nproc") -> None:
    """Raise BadInputError unless the number of processes divides every stage's batch size."""
    if num_processes < 1:
        raise BadInputError(f"{option} is {num_processes}, expected at least 1")
    sizes = {name: stage.batch_size for name, stage in config.stages.items()}
    wrong = [(name, size) for name, size in sizes.items() if size % num_processes]
    if not wrong:
        return
    common = math.gcd(*sizes.values())
    fitting = [n for n in range(1, common + 1) if common % n == 0]
    near = [max((n for n in fitting if n < num_processes), default=None)]
    near.append(min((n for n in fitting if n > num_processes), default=None))
    listed = "\n".join(
        f"  stage '{name}': batch_size {size} cannot be shared by {num_processes} processes"
        for name, size in wrong
    )
    works = " or ".join(str(n) for n in near if n is not None)
    raise BadInputError(
        f"{option} {num_processes} does not divide every batch size:\n{listed}\n"
        f"use {option} {works}, or other batch sizes"
    )


@dataclass(frozen=True)
class _Session:
    """One call of `run`, with the lock held."""

    config: RunConfig
    run_dir: Path
    backend: Backend
    console: Console
    interrupts: Interrupts
    until: str | None
    exporter: RunExporter

    def go(self) -> int:
        """Walk the stages; return the exit code."""
        failures: int | None = None  # attempts in a row without a new checkpoint
        while True:
            decision = decide(self.config, self.run_dir)
            if isinstance(decision, Done):
                self._say(f"run '{self.config.name}' is finished: {decision.checkpoint}")
                return 0
            if self.interrupts.count:
                return self._interrupted()
            if isinstance(decision, Stopped):
                self._say(f"{self.run_dir / STOP_NAME}: {decision.note}")
                self._say(f"to go on: rm {self.run_dir / STOP_NAME}, then the same command again")
                return 0
            if self._is_past(decision.stage):
                self._say(f"stage '{self.until}' is finished, as far as this call goes")
                return 0
            if failures is None:
                failures = self.backend.failures_before(
                    self.run_dir, stage=decision.stage, from_step=decision.from_step
                )
            ending, failures = self._attempt(decision, failures=failures)
            if ending.verdict is Verdict.BAD_INPUT:
                raise BadInputError(ending.reason)
            if ending.verdict is Verdict.GIVEN_UP:
                self._say(f"giving up: {failures} attempts in a row without a new checkpoint")
                return GIVEN_UP_CODE
            if ending.verdict is Verdict.PREEMPTED and self.backend.leaves_when_preempted:
                return self._interrupted()
            if ending.verdict is Verdict.CRASH:
                self._pause(self.backend.pause_seconds(failures))

    def _is_past(self, stage: str) -> bool:
        stages = list(self.config.stages)
        return self.until is not None and stages.index(stage) > stages.index(self.until)

    def _interrupted(self) -> int:
        if self.interrupts.count and not self.interrupts.asks_for_requeue:
            self._say(f"interrupted by {self.interrupts.signal.name}; {_GO_ON}")
            return self.interrupts.exit_code
        if not self.backend.leaves_when_preempted:
            self._say(f"interrupted by {self.interrupts.signal.name}; {_GO_ON}")
            return self.interrupts.exit_code
        self._say("interrupted; to be queued again")
        return REQUEUE_CODE

    def _attempt(self, decision: Start, *, failures: int) -> tuple[Ending, int]:
        """Make ready and run one incarnation; return its ending and the new count of failures."""
        unready = self.backend.prepare(
            self.config, run_dir=self.run_dir, interrupts=self.interrupts
        )
        if unready is None and self.interrupts.count:
            return Ending(Verdict.FINISHED, ""), failures  # the caller looks at the signal
        if unready is not None:
            self._say(f"not started: {unready.reason}")
            failures += unready.verdict is Verdict.CRASH
            if failures >= MAX_ATTEMPTS and unready.verdict is Verdict.CRASH:
                unready = Ending(Verdict.GIVEN_UP, unready.reason)
            return unready, failures
        return self._incarnate(position(self.config, decision), failures=failures)

    def _incarnate(self, before: tuple[int, int], *, failures: int) -> tuple[Ending, int]:
        """Run one incarnation, record it; return its ending and the new count of failures."""
        epoch = self.backend.new_epoch(self.run_dir)  # the fence first: nothing commits behind us
        start = decide(self.config, self.run_dir)
        if not isinstance(start, Start):  # what it kept out had just been committed, or STOP
            return Ending(Verdict.FINISHED, ""), 0
        self._announce(start, epoch=epoch)
        begun = start_incarnation(
            self.run_dir,
            epoch=epoch,
            stage=start.stage,
            from_step=start.from_step,
            world_size=self.backend.world_size,
        )
        ending = self._supervise(start, epoch=epoch)
        after = position(self.config, decide(self.config, self.run_dir))
        if ending.verdict is Verdict.FINISHED and after[0] == before[0]:
            reason = f"said '{start.stage}' is finished, but left no complete checkpoint of it"
            ending = Ending(Verdict.CRASH, reason, ending.log)
        ending = self.backend.review(ending, config=self.config, run_dir=self.run_dir)
        failures = 0 if after > before else failures + 1
        crashed = ending.verdict is Verdict.CRASH or (
            ending.verdict is Verdict.PREEMPTED and not self.backend.leaves_when_preempted
        )
        if crashed and failures >= MAX_ATTEMPTS and not self.interrupts.count:
            ending = Ending(Verdict.GIVEN_UP, ending.reason, ending.log)
        end_incarnation(self.run_dir, begun, verdict=ending.verdict, reason=ending.reason)
        self._report(start, ending, seconds=time.time() - begun.started_at, failures=failures)
        return ending, failures

    def _supervise(self, start: Start, *, epoch: str) -> Ending:
        follower = Follower(self.run_dir)
        order = Order(
            trainer=self.backend.trainer,
            run_dir=self.run_dir,
            stage=start.stage,
            epoch=epoch,
            world_size=self.backend.world_size,
            threads=self.config.runtime.threads,
        )
        with Display(
            self.console,
            stage=start.stage,
            from_step=start.from_step,
            target_step=start.target_step,
        ) as display:

            def tick() -> None:
                display.update([r for r in follower.poll() if r.epoch == epoch])
                self.exporter.tick()

            with self.exporter.ranks(epoch):
                return self.backend.incarnate(order, interrupts=self.interrupts, tick=tick)

    def _announce(self, start: Start, *, epoch: str) -> None:
        for fault in start.skipped:
            self._say(f"skipped: {fault}")
        place = "from the start" if start.checkpoint is None else f"after step {start.from_step}"
        self._say(
            f"{start.stage}: {place} of {start.target_step} steps, "
            f"{self.backend.describe()}, incarnation {epoch}"
        )

    def _report(self, start: Start, ending: Ending, *, seconds: float, failures: int) -> None:
        detail = f" ({ending.reason})" if ending.reason else ""
        if ending.verdict is Verdict.FINISHED:
            self._say(f"{start.stage}: finished after {duration(seconds)}{detail}")
        elif ending.verdict in (Verdict.CRASH, Verdict.GIVEN_UP):
            self._say(f"{start.stage}: crash: {ending.reason}")
            self._say(f"  its log: {ending.log}")
            if failures and ending.verdict is Verdict.CRASH:
                self._say(f"  attempt {failures} of {MAX_ATTEMPTS} without a new checkpoint")
        elif ending.verdict is not Verdict.BAD_INPUT:
            self._say(f"{start.stage}: {ending.verdict.value}{detail}")

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.interrupts.count:
            time.sleep(0.05)

    def _say(self, text: str) -> None:
        say(self.console, text)
