"""Kill a run again and again, at moments chosen to hurt, and compare it with one left alone.

    python tools/chaos.py debug --deaths 100 --seed 7
    python tools/chaos.py debug --deaths 100 --seed 7 --out benchmarks/chaos
    python tools/chaos.py debug --deaths 10 --keep /tmp/chaos stages.contrastive.steps=12

Deaths are drawn at random: SIGKILL of a rank, of the launcher, of all; SIGTERM of the launcher or
of a rank; a rank that is stopped (SIGSTOP) before it or its launcher is killed; all killed and a
bit of the newest checkpoint flipped; the disk full for eight seconds, where a small file system can
be mounted. Two thirds of them come while a checkpoint is being written or a stage hands over. Every
run is started again with the same command until it is done, a new one begins while deaths are left,
and each is compared with the undisturbed run: losses, gradient norms, records and final weights, to
the last bit. Exit code 1 if anything differs. Two deaths without a checkpoint between them are
followed by one, because a launcher gives up after three. Interrupted itself, the same command goes
on where it was; its state is in a folder that it names.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from chaos_run import (
    FILL_THE_DISK,
    KINDS,
    MOMENTS,
    ChaosError,
    Place,
    Run,
    harm,
    judge,
    settle,
    wait_for,
    wait_for_the_end,
)

from cocoa_dist.config import load_recipe
from cocoa_dist.manifest import write_atomic

STATE_NAME = "chaos.json"
DISK_MEGABYTES = 160  # of a run's own small disk; a run of `debug` needs a quarter of it


@dataclass(frozen=True)
class Death:
    """One that has happened."""

    kind: str
    moment: str  # that was waited for
    place: Place
    round: int


@dataclass
class State:
    """All that is known so far; written after every death, read by the next call."""

    settings: dict[str, Any]
    deaths: list[Death] = field(default_factory=list)
    rounds: int = 0  # runs that were disturbed and compared
    starts: int = 0  # of launchers
    steps: int = 0  # that were compared
    lost: int = 0
    repeated: int = 0
    manual_steps: int = 0
    seconds: float = 0.0
    no_disk: str = ""  # why none could be filled
    faults: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the state file."""
        write_atomic(folder / STATE_NAME, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: Path, *, settings: dict[str, Any]) -> "State":
        """Go on from a state file, or from nothing. Raises SystemExit if it is of another run."""
        path = folder / STATE_NAME
        if not path.is_file():
            return State(settings)
        content = json.loads(path.read_bytes())
        if content["settings"] != settings:
            raise SystemExit(
                f"{path} is of {content['settings']}, this call is {settings}: remove {folder}, or "
                "give another --keep"
            )
        deaths = [Death(**{**d, "place": Place(**d["place"])}) for d in content.pop("deaths")]
        return State(**{**content, "deaths": deaths})


def main(argv: Sequence[str] | None = None) -> int:
    """Do all deaths and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name of a recipe, or path of a .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--deaths", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="only such deaths; may be given again"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave it")
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json and PATH.md")
    options = parser.parse_intermixed_args(argv)
    stages = list(load_recipe(options.recipe, options.overrides).stages)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    folder = options.keep or _default_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        chaos = Chaos(folder.resolve(), options, stages=stages)
        chaos.go()
        text = report(chaos.state)
        print(f"\n{text}", end="")
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            written = json.dumps(asdict(chaos.state), indent=1)
            options.out.with_suffix(".json").write_text(f"{written}\n")
            options.out.with_suffix(".md").write_text(text)
        if options.keep:
            print(f"run folders and logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if chaos.state.faults else 0


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # through the `finally` that ends what runs


def _default_folder(options: argparse.Namespace) -> Path:
    """Return where the same command finds its state again."""
    name = f"chaos-{os.getuid()}-{Path(options.recipe).stem}-{options.seed}"
    return Path(tempfile.gettempdir()) / name


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder against a second call with the same state."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder} is held by another call: wait, or give --keep") from None
        yield


class Chaos:
    """Disturbs one run after the other until all deaths have happened."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, stages: list[str]) -> None:
        self.folder, self.options, self.stages = folder, options, stages
        self.kinds: list[str] = options.kind or list(KINDS)
        names = ("recipe", "overrides", "seed", "nproc", "kind")
        self.state = State.read(folder, settings={name: getattr(options, name) for name in names})
        self.began, self.deaths_before = time.monotonic(), len(self.state.deaths)
        self.seconds_before = self.state.seconds

    def go(self) -> None:
        """Do the undisturbed run, then disturbed ones; a fault ends it, and is in the state."""
        state = self.state
        if state.deaths:
            print(f"going on after {len(state.deaths)} deaths, see {self.folder}", flush=True)
        quiet = self._run("undisturbed")
        try:
            self._undisturbed(quiet)
            while len(state.deaths) < self.options.deaths and not state.faults:
                self._round(quiet)
        except ChaosError as error:
            state.faults.append(f"round {state.rounds + 1}: {error}")
        self._note()

    def _run(self, name: str, *, disk: Path | None = None) -> Run:
        where = (disk or self.folder) / name
        words = [*self.options.overrides, "data.log_sample_ids=true", "--run-dir", str(where)]
        command = [sys.executable, "-m", "launcher", "run", self.options.recipe, *words]
        command = [*command, "--nproc", str(self.options.nproc)]
        return Run(where, command, self.folder / f"{name}.log", disk)

    def _undisturbed(self, run: Run) -> None:
        """Finish the run that all others are compared with; nothing to do if it is finished."""
        run.kill_all()
        run.start()
        assert run.process is not None
        if run.process.wait():
            raise ChaosError(f"the undisturbed run ended with {run.process.returncode}: {run.log}")

    def _round(self, quiet: Run) -> None:
        """Drive one run to its end through as many deaths as come before it; compare it."""
        state, number = self.state, self.state.rounds + 1
        with self._disk(number) as disk:
            run = self._run(f"round_{number:03d}", disk=disk)
            if not run.folder.exists():  # a call before this one lost it, unjudged, with its disk
                state.deaths = [death for death in state.deaths if death.round != number]
            try:
                self._disturb(run)
                verdict = judge(quiet, run, stages=self.stages)
            finally:
                run.kill_all()
                if self.options.keep and disk:
                    shutil.copytree(run.folder, self.folder / run.folder.name, dirs_exist_ok=True)
            if not self.options.keep:
                shutil.rmtree(run.folder, ignore_errors=True)
        state.rounds, state.starts = number, state.starts + run.starts
        state.steps += verdict.steps
        state.lost, state.repeated = state.lost + verdict.lost, state.repeated + verdict.repeated
        state.manual_steps += run.manual_steps
        state.faults += [f"round {number}: {text}" for text in verdict.describe()]
        self._note()

    def _disturb(self, run: Run) -> None:
        run.kill_all()  # of a call that was killed itself
        run.start()
        while len(self.state.deaths) < self.options.deaths:
            number = len(self.state.deaths) + 1
            draw = random.Random(f"{self.options.seed} {number} {run.starts}")
            kinds = [kind for kind in self.kinds if run.disk or kind != FILL_THE_DISK]
            kind = draw.choices(kinds, [KINDS[kind] for kind in kinds])[0]
            moment = draw.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            place = harm(run, kind, draw) if wait_for(run, moment, draw) else None
            if place is not None:
                self.state.deaths.append(Death(kind, moment, place, self.state.rounds + 1))
                self._say(self.state.deaths[-1])
                self._note()
            if settle(run):
                return
        wait_for_the_end(run)

    def _say(self, death: Death) -> None:
        """Print a death, and how long the rest will take at this pace."""
        done, place = len(self.state.deaths), death.place
        here = done - self.deaths_before
        gone = time.monotonic() - self.began
        left = gone / here * (self.options.deaths - done)
        saving = ", a checkpoint being written" if place.saving else ""
        print(
            f"{done:4d}/{self.options.deaths}  {death.kind}, {death.moment}: {place.stage} step "
            f"{place.step}{saving}; {_clock(self.seconds_before + gone)} gone, about "
            f"{_clock(left)} left",
            flush=True,
        )

    def _note(self) -> None:
        self.state.seconds = self.seconds_before + time.monotonic() - self.began
        self.state.write(self.folder)

    @contextmanager
    def _disk(self, number: int) -> Iterator[Path | None]:
        """Mount a small file system for every second run, where that is allowed.

        Raises ChaosError where it is not, and nothing else was asked for.
        """
        folder = self.folder / f"disk_{number:03d}"
        needed = self.kinds == [FILL_THE_DISK]
        if (number % 2 and not needed) or not self._mount(folder):
            if needed:
                raise ChaosError(f"no small file system here: {self.state.no_disk}")
            yield None
            return
        try:
            yield folder
        finally:
            _run_quietly("umount", "-l", str(folder))
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _mount(self, folder: Path) -> bool:
        if folder.is_mount():  # left by a call that was killed; the run in it goes on
            return True
        folder.mkdir(exist_ok=True)
        size = f"size={DISK_MEGABYTES}m"
        self.state.no_disk = _run_quietly("mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder))
        return not self.state.no_disk


def _run_quietly(*command: str) -> str:
    """Run a command; return why it failed, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def report(state: State) -> str:
    """Return the table and the verdict as markdown."""
    counts = Counter((death.kind, death.moment) for death in state.deaths)
    saving = Counter(death.kind for death in state.deaths if death.place.saving)
    head = [*MOMENTS, "in all", "of them into a save"]
    rows = []
    for kind in KINDS:
        row = [counts[kind, moment] for moment in MOMENTS]
        rows.append((kind, [*row, sum(row), saving[kind]]))
    rows.append(("**in all**", [sum(column) for column in zip(*(r for _, r in rows), strict=True)]))
    settings = state.settings
    kinds = [f"--kind '{kind}'" for kind in settings["kind"] or ()]
    recipe = " ".join([settings["recipe"], *settings["overrides"], *kinds])
    lines = [
        "# A run that is killed again and again",
        "",
        f"`python tools/chaos.py {recipe} --deaths {len(state.deaths)} --seed {settings['seed']} "
        f"--nproc {settings['nproc']}`",
        "",
        f"| deaths |{''.join(f' {name} |' for name in head)}",
        f"| --- |{' ---: |' * len(head)}",
        *(f"| {name} |{''.join(f' {number} |' for number in row)}" for name, row in rows),
        "",
        *_verdict(state),
    ]
    return "\n".join(lines) + "\n"


def _verdict(state: State) -> list[str]:
    stages = Counter(death.place.stage for death in state.deaths)
    spread = ", ".join(f"{name} {count}" for name, count in stages.items())
    lines = [
        f"- {len(state.deaths)} deaths in {state.rounds} runs, {state.starts} starts of the "
        f"launcher, {state.seconds / 60:.1f} minutes; by stage: {spread}",
        f"- {state.steps} steps compared: records lost {state.lost}, repeated {state.repeated}; "
        f"manual steps {state.manual_steps}",
    ]
    if state.no_disk:
        lines.append(f"- {FILL_THE_DISK}: skipped, no small file system here ({state.no_disk})")
    lines += [f"- **FAULT** {fault}" for fault in state.faults]
    if not state.faults:
        lines.append(
            "- every run ended bit-identical to the undisturbed one; first difference of losses, "
            "gradient norms or weights: none"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
