"""A run folder written line by line, and where its time went."""

import json
from pathlib import Path
from typing import Any

from launcher_harness import make_launch

from cocoa_dist.config import RunConfig, load_recipe
from cocoa_dist.metrics import CAUSES
from launcher.ledger import Ledger, read_ledger
from launcher.runfolder import prepare

START = 1_000_000.0  # seconds since 1970


class Story:
    """A run folder written line by line; times are seconds since the first start."""

    def __init__(self, folder: Path) -> None:
        launch = make_launch(folder)
        self.config: RunConfig = load_recipe(str(launch.recipe))
        self.run_dir = launch.run_dir
        self.run_dir.mkdir()
        prepare(self.run_dir, config=self.config, recipe_file=launch.recipe)
        (self.run_dir / "events.jsonl").unlink()  # says that the run was submitted now
        self._epoch = ""

    def start(
        self, at: float, *, stage: str = "a", from_step: int = 0, ranks: int = 4, name: str = ""
    ) -> None:
        self._epoch, self._stage = name or f"local-{at:g}", stage
        self._at, self._from, self._ranks = at, from_step, ranks
        self._incarnation()

    def end(self, at: float, verdict: str, *, reason: str = "") -> None:
        self._incarnation(ended_at=START + at, verdict=verdict, reason=reason)

    def phase(self, at: float, name: str, *, step: int = 0) -> None:
        self._event(kind="phase", time=START + at, phase=name, step=step)

    def beat(
        self, at: float, *, step: int, steps: int, seconds: float, waited: float = 0.0
    ) -> None:
        """Steps of equal length, the last of which ended at `at`."""
        spent = {"seconds": seconds, "waited": waited, "longest": seconds / steps}
        self._event(kind="beat", time=START + at, step=step, steps=steps, **spent)

    def launch(self, at: float) -> None:
        """A launcher is at work from here on."""
        self._append("events.jsonl", {"kind": "launched", "time": START + at})

    def ledger(self, at: float, *, live: bool = False) -> Ledger:
        return read_ledger(self.run_dir, self.config, now=START + at, live=live)

    def _incarnation(self, **fields: Any) -> None:
        line = {"epoch": self._epoch, "stage": self._stage, "from_step": self._from}
        line |= {"world_size": self._ranks, "started_at": START + self._at, **fields}
        self._append("incarnations.jsonl", line)

    def _event(self, **fields: Any) -> None:
        self._append("events.jsonl", {**fields, "stage": self._stage, "epoch": self._epoch})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a") as file:
            file.write(json.dumps(line) + "\n")


def train(story: Story, begin: float, *, step: int = 0) -> None:
    """Start-up of 10 s, restore of 5 s."""
    story.phase(begin + 10, "restore")
    story.phase(begin + 15, "start")
    story.phase(begin + 16, "train", step=step)


def spent(ledger: Ledger) -> dict[str, float]:
    assert set(ledger.seconds) == set(CAUSES)
    return {cause: round(seconds, 6) for cause, seconds in ledger.seconds.items() if seconds}
