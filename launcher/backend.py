"""What the launcher asks of a backend, and what one incarnation of one stage is.

A backend starts the ranks of a stage, waits for them and says how it ended. What the ranks agreed
on comes back through `outcome.json`; exit codes only say that they did not get that far.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from cocoa_dist.config import RunConfig
from launcher.history import Verdict
from launcher.runfolder import RESOLVED_NAME
from launcher.signals import Interrupts

OUTCOME_NAME = "outcome.json"
BAD_INPUT_CODE = 2


class BadInputError(ValueError):
    """Something the caller gave cannot be used; the message says what to change."""


class Outcome(BaseModel):
    """`outcome.json`: what the ranks agreed on before they left; rank 0 writes it."""

    model_config = ConfigDict(frozen=True)

    epoch: str
    stage: str
    step: int
    verdict: Literal["finished", "preempted", "stopped"]
    reason: str | None = None


@dataclass(frozen=True)
class Order:
    """One incarnation to run."""

    trainer: tuple[str, ...]
    run_dir: Path  # absolute
    stage: str
    epoch: str
    world_size: int
    threads: int

    def command(self) -> list[str]:
        """Return the command line of a rank, the same for all."""
        resolved = str(self.run_dir / RESOLVED_NAME)
        return [*self.trainer, resolved, "--stage", self.stage, "--run-dir", str(self.run_dir)]

    def log_path(self, rank: int | str) -> Path:
        """Return where stdout and stderr of a rank go."""
        return self.run_dir / "logs" / self.epoch / f"{self.stage}.rank{rank}.log"


@dataclass(frozen=True)
class Ending:
    """How an incarnation ended; `log` is the file to read first, if there is one."""

    verdict: Verdict
    reason: str
    log: Path | None = None
    node: str | None = None  # where what ended it happened, if that is known


class Backend(Protocol):
    """Where ranks run."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def trainer(self) -> tuple[str, ...]:
        """Command of a rank, without its arguments."""

    @property
    def check_command(self) -> tuple[str, ...]:
        """Command that looks at the inputs of a recipe, without its arguments."""

    @property
    def size_option(self) -> str:
        """What a user changes to get another number of ranks."""

    @property
    def leaves_when_preempted(self) -> bool:
        """Whether somebody else starts the run again after an interruption of the ranks."""

    def describe(self) -> str:
        """Say where the ranks run, for the log."""

    def hold(self, run_dir: Path) -> AbstractContextManager[None]:
        """Hold the run folder. Raises RunFolderError naming the holder if another one does."""

    def new_epoch(self, run_dir: Path) -> str:
        """Name a new incarnation; from now on no earlier one can commit."""

    def failures_before(self, run_dir: Path, *, stage: str, from_step: int) -> int:
        """Count attempts in a row without a new checkpoint that were made before this call."""

    def prepare(self, config: RunConfig, *, run_dir: Path, interrupts: Interrupts) -> Ending | None:
        """Do what has to be done before ranks can start; an Ending if they cannot."""

    def incarnate(
        self, order: Order, *, interrupts: Interrupts, tick: Callable[[], None]
    ) -> Ending:
        """Start the ranks, wait until all have left, and return how it ended."""

    def review(self, ending: Ending, *, config: RunConfig, run_dir: Path) -> Ending:
        """Judge an ending again by what is known of the place: a fault of ours, or the site's."""

    def pause_seconds(self, failures: int) -> float:
        """Return how long to wait before the next attempt after so many failures."""


def read_outcome(order: Order) -> Outcome | None:
    """Return what the ranks of this incarnation agreed on; None if they did not say."""
    try:
        outcome = Outcome.model_validate_json((order.run_dir / OUTCOME_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return outcome if (outcome.epoch, outcome.stage) == (order.epoch, order.stage) else None


def end_by_outcome(order: Order) -> Ending:
    """Return the ending of an incarnation whose ranks have all left with 0."""
    outcome = read_outcome(order)
    if outcome is None:
        reason = f"the ranks left with 0, but {OUTCOME_NAME} has nothing of this incarnation"
        return Ending(Verdict.CRASH, reason, order.log_path(0))
    return Ending(Verdict(outcome.verdict), outcome.reason or "", order.log_path(0))
