"""Does the goodput ledger add up? A real run is disturbed with a watch in hand, then asked.

    python tools/bench_ledger.py                          # debug, about four minutes
    python tools/bench_ledger.py --out benchmarks/ledger  # keep the table

Two stages of `debug` on two processes: a rank is killed (SIGKILL) behind a checkpoint, the launcher
is told to leave (SIGTERM) and started again after a while, a rank is stopped (SIGSTOP) for longer
than a minute, the launcher is told to leave again, and the run ends on one process. Beside each
cause of the ledger stands what this tool saw of it from outside: its own clock, `metrics.jsonl` and
`/proc`. Exit code 1 if the causes do not add up to the wall time within 1 %, if more than 2 % of it
has no cause, or if a cause is not what was done to the run.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.config import load_resolved  # noqa: E402
from cocoa_dist.metrics import METRICS_NAME  # noqa: E402
from launcher.history import Incarnation, read_incarnations  # noqa: E402
from launcher.ledger import HANG_SECONDS, Ledger, read_diary, read_ledger  # noqa: E402

FIRST, SECOND = "joint_reconstruction", "eos_bridged_reconstruction"
PATIENCE = 300.0  # seconds for anything that is waited for
STEPS, EVERY = 48, 8


@dataclass
class Seen:
    """What was done to the run, by this tool's clock."""

    began: float = 0.0  # seconds since 1970
    ended: float = 0.0
    held: list[float] = field(default_factory=list)  # seconds without ranks, to the next command
    came: list[float] = field(default_factory=list)  # seconds until the next one showed itself
    stopped: float = 0.0  # seconds
    replayed: int = 0  # steps behind the checkpoint when the rank was killed, as logged
    replayed_seconds: float = 0.0


class Disturbed:
    """One run, its launcher, and what happens to it."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.log = folder / "run", folder / "log"
        self.seen = Seen()
        self.process: subprocess.Popen[bytes] | None = None

    def play(self, *, hold: float, hang: float) -> None:
        """Let all of it happen."""
        self.seen.began = time.time()
        self.start(processes=2)
        self.wait_for_step(FIRST, EVERY + 3)
        os.kill(self.rank(1), signal.SIGKILL)
        time.sleep(0.5)  # a step that was under way may still be logged
        lost = [line["step_seconds"] for line in self.lines() if line["step"] > EVERY]
        self.seen.replayed, self.seen.replayed_seconds = len(lost), sum(lost)
        self.wait(lambda: len(read_incarnations(self.run_dir)) == 2, "the restart")
        self.wait_for_step(FIRST, 3 * EVERY + 2)
        self.preempt(hold=hold)
        self.start(processes=2)
        self.wait_for_step(SECOND, EVERY + 2)
        self.suspend(self.rank(1), seconds=hang)
        self.wait_for_step(SECOND, 3 * EVERY)
        self.preempt(hold=hold)
        self.start(processes=1)
        self.leave(expected=0)
        self.seen.ended = time.time()

    def start(self, *, processes: int) -> None:
        """Give the command that starts the run, or goes on with it."""
        command = [sys.executable, "-m", "launcher", "run", "debug", "--until", SECOND]
        command += ["--run-dir", str(self.run_dir), "--nproc", str(processes)]
        command += [f"checkpoint.every_steps={EVERY}", "metrics.log_every_steps=1"]
        command += [f"stages.{stage}.steps={STEPS}" for stage in (FIRST, SECOND)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        began, before = time.monotonic(), self.launches()
        if before:
            self.wait(lambda: self.launches() > before, "the launcher")
            self.seen.came.append(time.monotonic() - began)

    def preempt(self, *, hold: float) -> None:
        """Tell the launcher to leave, and start no other one for a while."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        ended = lambda: not read_incarnations(self.run_dir)[-1].running  # noqa: E731
        self.wait(ended, "the end of the ranks")
        began = time.monotonic()
        self.leave(expected=128 + signal.SIGTERM)
        time.sleep(hold)
        self.seen.held.append(time.monotonic() - began)

    def suspend(self, pid: int, *, seconds: float) -> None:
        """Stop a process for a while."""
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        self.seen.stopped += time.monotonic() - began

    def leave(self, *, expected: int) -> None:
        """Wait until the launcher has left; SystemExit if not with this code."""
        assert self.process is not None
        code = self.process.wait(timeout=PATIENCE)
        if code != expected:
            raise SystemExit(f"the launcher left with {code}, not {expected}\n{self.tail()}")

    def end(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait_for_step(self, stage: str, step: int) -> None:
        """Wait until a step is logged."""

        def reached() -> bool:
            return any(line["stage"] == stage and line["step"] >= step for line in self.lines())

        self.wait(reached, f"{stage} step {step}")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait while the launcher is at work; SystemExit if it leaves, or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline or (self.process and self.process.poll() is not None):
                raise SystemExit(f"waited in vain for {what}\n{self.tail()}")
            time.sleep(0.1)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines of metrics.jsonl."""
        path = self.run_dir / METRICS_NAME
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def launches(self) -> int:
        """Return how many launchers have said in the diary that they are at work."""
        return len(read_diary(self.run_dir).launches)

    def rank(self, number: int) -> int:
        """Return the process of a rank."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                environment = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = b"cocoa_dist.train" in command and str(self.run_dir).encode() in command
            if ours and f"RANK={number}".encode() in environment:
                return int(path.name)
        raise SystemExit(f"no process is rank {number}\n{self.tail()}")

    def tail(self) -> str:
        """Return the last of what the launchers said."""
        return "\n".join(self.log.read_text().splitlines()[-20:]) if self.log.exists() else ""


@dataclass(frozen=True)
class Line:
    """One cause: what the ledger says, what was seen from outside, and how far that may differ."""

    cause: str
    seconds: float
    expected: float | None = None  # None: cannot be told from outside
    within: float = 0.0  # seconds
    how: str = ""

    @property
    def fits(self) -> bool:
        """Whether the ledger agrees with what was seen."""
        return self.expected is None or abs(self.seconds - self.expected) <= self.within


def judge(run: Disturbed, ledger: Ledger) -> list[Line]:
    """Put what was seen beside what the ledger says; the wall time comes last."""
    seen, found = run.seen, ledger.seconds
    lines = list(run.lines())
    inside = sum(line["step_seconds"] - line["data_wait_seconds"] for line in lines) - seen.stopped
    waited = sum(line["data_wait_seconds"] for line in lines)
    came = sum(seen.came)
    expected: dict[str, tuple[float, float, str]] = {
        "productive": (inside, 0.02 * inside + 1.0, "steps in `metrics.jsonl`, less the stop"),
        "data_wait": (waited, 0.5 + 0.1 * waited, "waits in `metrics.jsonl`, and of lost steps"),
        "queue": (
            sum(seen.held) + came / 2,
            came / 2 + 0.5,
            f"{' + '.join(f'{s:.1f}' for s in seen.held)} s from the end of the ranks to the next "
            f"command, and at most {came:.1f} until its launcher showed itself",
        ),
        "replay": (
            seen.replayed_seconds + 1.0,
            1.0 + 0.2 * seen.replayed_seconds,
            f"{seen.replayed} logged steps behind the checkpoint, and the one that was under way",
        ),
        "hang": (seen.stopped, 2.0, f"a rank stopped for {seen.stopped:.1f} s"),
        "evaluation": (0.0, 0.0, "none inside the run"),
        "unknown": (0.0, 0.02 * ledger.wall_seconds, "at most 2 % of the wall time"),
    }
    rows = [Line(cause, spent, *expected.get(cause, ())) for cause, spent in found.items()]
    wall = seen.ended - seen.began
    how = "this tool's clock, within 1 %"
    return [*rows, Line("all", ledger.wall_seconds, wall, 0.01 * wall, how)]


def render(rows: list[Line], incarnations: list[Incarnation], seen: Seen) -> str:
    """Return the table."""
    wall = rows[-1].seconds
    text = ["# Where the time of a disturbed run went", ""]
    text += [
        "`python tools/bench_ledger.py --out benchmarks/ledger`: two stages of `debug` on real "
        f"processes of a {platform.machine()} machine of {os.cpu_count()} shared cores. One rank "
        "was killed, the launcher told to leave twice and started again later, a rank stopped for "
        f"{seen.stopped:.0f} s. `seen` is what the tool measured from outside.",
        "",
        "| incarnation | stage | ranks | from step | to step | ended | steps done again |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, item in enumerate(incarnations, start=1):
        ended = item.verdict.value if item.verdict else "-"
        text.append(
            f"| {number} | {item.stage} | {item.world_size} | {item.from_step} | {item.step} "
            f"| {ended} | {item.replayed_steps} |"
        )
    text += ["", "| cause | seconds | share | seen | how |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        outside = "-" if row.expected is None else f"{row.expected:.1f} +- {row.within:.1f}"
        mark = "" if row.fits else " **differs**"
        share = f"{row.seconds / wall:.2%}"
        text.append(f"| {row.cause} | {row.seconds:.2f} | {share} | {outside}{mark} | {row.how} |")
    total = sum(row.seconds for row in rows[:-1])
    text += ["", f"Sum of the causes: {total:.2f} s of {wall:.2f} s."]
    return "\n".join(text) + "\n"


def main() -> int:
    """Disturb a run and print its ledger; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, help="write the table to OUT.md")
    parser.add_argument("--hold", type=float, default=10.0, help="seconds without a launcher")
    parser.add_argument(
        "--hang",
        type=float,
        default=HANG_SECONDS + 10,
        help=f"seconds a rank is stopped, above {HANG_SECONDS:.0f}",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cocoa-ledger-") as folder:
        run = Disturbed(Path(folder))
        try:
            run.play(hold=options.hold, hang=options.hang)
        finally:
            run.end()
        config = load_resolved(run.run_dir / "resolved.yaml")
        ledger = read_ledger(run.run_dir, config, now=run.seen.ended, live=False)
        rows = judge(run, ledger)
        incarnations = read_incarnations(run.run_dir)
        text = render(rows, incarnations, run.seen)
    sys.stdout.write(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text)
    wrong = [row.cause for row in rows if not row.fits]
    if wrong:
        sys.stdout.write(f"differs from what was done to the run: {', '.join(wrong)}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
