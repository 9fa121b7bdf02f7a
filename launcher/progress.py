"""Shows a stage as it goes: a bar on a terminal, now and then a line elsewhere."""

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from launcher.steplog import StepRecord

_WINDOW = 50  # steps the rate is taken over
_LINE_SHARE = 0.1  # of the stage between two lines
_LINE_SECONDS = 15.0


def say(console: Console, text: str) -> None:
    """Write a line as it is: no markup, no colour of numbers, no folding."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class Display:
    """The progress of one incarnation of a stage.

    It uses no thread: a thread would make it unsafe to start the ranks by fork.
    """

    def __init__(self, console: Console, *, stage: str, from_step: int, target_step: int) -> None:
        self._console = console
        self._stage = stage
        self._target_step = target_step
        self._recent: deque[StepRecord] = deque(maxlen=_WINDOW)
        self._said_step = from_step
        self._said_at = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(
                stage, total=target_step, completed=from_step, facts="starting"
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, records: Sequence[StepRecord]) -> None:
        """Take in new steps of this incarnation and show them if it is time to."""
        self._recent.extend(records)
        if self._bar is not None:
            if records:
                self._bar.update(self._task, completed=records[-1].step, facts=self._facts())
            self._bar.refresh()
        elif self._recent and self._due(self._recent[-1].step):
            self._said_step, self._said_at = self._recent[-1].step, time.monotonic()
            say(
                self._console,
                f"{self._stage}: step {self._said_step}/{self._target_step}, {self._facts()}",
            )

    def _due(self, step: int) -> bool:
        if step == self._said_step:
            return False
        if step >= self._target_step or step - self._said_step >= _LINE_SHARE * self._target_step:
            return True
        return time.monotonic() - self._said_at >= _LINE_SECONDS

    def _facts(self) -> str:
        first, last = self._recent[0], self._recent[-1]
        facts: list[str] = []
        if last.step > first.step and last.time > first.time:
            rate = (last.step - first.step) / (last.time - first.time)
            left = (self._target_step - last.step) / rate
            facts += [f"{rate:.2f} steps/s", f"{duration(left)} left"]
        if last.loss is not None:
            facts.insert(len(facts) // 2, f"loss {last.loss:.4g}")
        return ", ".join(facts) or "first step done"
