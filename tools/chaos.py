"""Kill a run again and again, at moments chosen to hurt, and compare it with one left alone.

    python tools/chaos.py debug --deaths 100 --seed 7
    python tools/chaos.py debug --deaths 10 --keep /tmp/chaos stages.contrastive.steps=12

Deaths are drawn at random: SIGKILL of a rank, of the launcher, of all; SIGTERM of the launcher or
of a rank; a rank that is stopped (SIGSTOP) and killed two seconds later; all killed and a byte of
the newest checkpoint flipped. Half of them come while a checkpoint is being written or a stage
hands over. Every run is started again with the same command until it is done, a new one begins
while deaths are left, and each is compared with the undisturbed run: losses, gradient norms,
records and final weights, to the last bit. Exit code 1 if anything differs. Two deaths without a
checkpoint between them are followed by one, because a launcher gives up after three.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from compare_runs import compare, read_steps  # noqa: E402

from cocoa_dist.config import load_recipe  # noqa: E402
from cocoa_dist.manifest import step_folders  # noqa: E402
from cocoa_dist.metrics import read_json_lines  # noqa: E402

KINDS = (
    "kill a rank",
    "kill the launcher",
    "kill all",
    "term the launcher",
    "term a rank",
    "stop a rank, then kill it",
    "kill all, flip a byte",
)
MOMENTS = {"while starting": 1, "in a step": 2, "while saving": 2, "at a stage's end": 1}
PATIENCE = 600.0  # seconds without any progress before the tool gives up
RESTARTABLE = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)  # ended by a signal


class ChaosError(RuntimeError):
    """The run did not come back."""


@dataclass
class Tally:
    """What was done and what came of it."""

    deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    rounds: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One run folder that is being disturbed."""

    folder: Path
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    since_checkpoint: int = 0  # deaths since the last new checkpoint
    seen_step: tuple[int, int] = (0, 0)

    def start(self) -> None:
        """Start the launcher, or go on with the run."""
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def steps(self) -> int:
        """Return how many steps the run's record has."""
        with contextlib.suppress(ValueError):  # being rewritten
            return sum(1 for _ in read_json_lines(self.folder / "metrics.jsonl"))
        return 0

    def checkpoints(self) -> list[Path]:
        """Return all committed checkpoints."""
        return sorted((self.folder / "checkpoints").glob("*/step_*"))

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob("*/.staging-step*"))

    def ranks(self) -> list[int]:
        """Return the process ids of the run's trainers."""
        mark, found = str(self.folder).encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes()
                    if b"cocoa_dist.train" in words and mark in words:
                        found.append(int(entry.name))
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the deaths and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="name of a recipe, or path of a .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--deaths", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the run folders there")
    options = parser.parse_args(argv)
    stages = list(load_recipe(options.recipe, options.overrides).stages)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.keep))
    tally, began = Tally(), time.monotonic()
    try:
        disturb(folder, options, stages=stages, tally=tally)
    except ChaosError as error:
        tally.faults.append(str(error))
    show(tally, seconds=time.monotonic() - began)
    if options.keep:
        print(f"run folders: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if tally.faults else 0


def disturb(folder: Path, options: argparse.Namespace, *, stages: list[str], tally: Tally) -> None:
    """Do the undisturbed run, then disturbed ones until all deaths have happened."""

    def run(name: str) -> Run:
        where = folder / name
        words = [*options.overrides, "data.log_sample_ids=true", "--run-dir", str(where)]
        command = [sys.executable, "-m", "launcher", "run", options.recipe, *words]
        return Run(where, [*command, "--nproc", str(options.nproc)])

    quiet = run("undisturbed")
    done = subprocess.run(quiet.command, capture_output=True, check=False, cwd=ROOT)
    if done.returncode:
        raise ChaosError(
            f"the undisturbed run ended with {done.returncode}: {done.stderr[-2000:]!r}"
        )
    draw = random.Random(options.seed)
    while sum(tally.deaths.values()) < options.deaths:
        tally.rounds += 1
        harmed = run(f"round_{tally.rounds:03d}")
        one_round(harmed, draw, tally=tally, deaths=options.deaths)
        tally.faults += [f"{harmed.folder.name}: {f}" for f in faults(quiet, harmed, stages)]
        if not options.keep:
            shutil.rmtree(harmed.folder, ignore_errors=True)


def one_round(run: Run, draw: random.Random, *, tally: Tally, deaths: int) -> None:
    """Drive one run to its end through as many deaths as come before it."""
    run.start()
    tally.starts += 1
    while True:
        if sum(tally.deaths.values()) < deaths:
            kind = draw.choice(KINDS)
            moment = draw.choices(list(MOMENTS), list(MOMENTS.values()))[0]
            if wait_for(run, moment, draw) and kill(run, kind, draw):
                tally.deaths[kind, moment] += 1
                print(f"{sum(tally.deaths.values()):4d}  {kind}, {moment}", flush=True)
        code = settle(run)
        if code == 0:
            return
        if code is not None and code not in RESTARTABLE:
            raise ChaosError(f"{run.folder.name}: the launcher left with {code}")
        if code is not None:
            run.start()
            tally.starts += 1


def wait_for(run: Run, moment: str, draw: random.Random) -> bool:
    """Wait until it is time to kill; False if the run has ended before."""
    if moment == "while starting" and run.since_checkpoint < 2:
        return pause(run, draw.uniform(0.0, 6.0))
    before, known = run.steps(), len(run.checkpoints())
    wanted = draw.randint(1, 4)
    reached: Callable[[], bool] = {
        "while starting": lambda: len(run.checkpoints()) > known,
        "in a step": lambda: run.steps() >= before + wanted,
        "while saving": run.saving,
        "at a stage's end": lambda: any((run.folder / "checkpoints").glob("*/*/weights.*")),
    }[moment]
    needed = known + 1 if run.since_checkpoint >= 2 else known
    deadline = time.monotonic() + PATIENCE
    while not (reached() and len(run.checkpoints()) >= needed):
        if run.process is None or run.process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise ChaosError(
                f"{run.folder.name}: nothing new in {PATIENCE:.0f} s, waiting: {moment}"
            )
        time.sleep(0.002)
    return pause(run, draw.uniform(0.0, 0.15))


def pause(run: Run, seconds: float) -> bool:
    """Sleep; False if the run has ended meanwhile."""
    time.sleep(seconds)
    return run.process is not None and run.process.poll() is None


def kill(run: Run, kind: str, draw: random.Random) -> bool:
    """Do it; False if there was nobody left to do it to."""
    assert run.process is not None
    launcher, ranks = run.process.pid, run.ranks()
    committed = len(run.checkpoints())
    run.since_checkpoint = 1 if committed > run.seen_step[0] else run.since_checkpoint + 1
    run.seen_step = (committed, run.steps())
    if "rank" in kind and not ranks:
        return False
    if kind == "kill a rank":
        return send(draw.choice(ranks), signal.SIGKILL)
    if kind == "kill the launcher":
        return send(launcher, signal.SIGKILL)
    if kind == "term the launcher":
        return send(launcher, signal.SIGTERM)
    if kind == "term a rank":
        return send(draw.choice(ranks), signal.SIGTERM)
    if kind == "stop a rank, then kill it":
        victim = draw.choice(ranks)
        stopped = send(victim, signal.SIGSTOP)
        time.sleep(2.0)
        return send(victim, signal.SIGKILL) and stopped
    for victim in (launcher, *ranks):
        send(victim, signal.SIGKILL)
    if "flip" in kind:
        flip_a_byte(run, draw)
    return True


def flip_a_byte(run: Run, draw: random.Random) -> None:
    """Damage a file of the newest checkpoint, if it is not the only one of its stage."""
    run.process.wait() if run.process else None
    newest = max(run.checkpoints(), key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is None or len(step_folders(run.folder, stage=newest.parent.name)) < 2:
        return
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    victim = draw.choice(files)
    content = bytearray(victim.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)


def settle(run: Run) -> int | None:
    """Return the launcher's exit code once its ranks are gone too; None while it lives."""
    assert run.process is not None
    time.sleep(0.3)
    code = run.process.poll()
    if code is None and sum(run.seen_step) and run.since_checkpoint == 0:
        return None
    deadline = time.monotonic() + PATIENCE
    while code is not None and run.ranks():  # orphans see that the launcher is gone, and leave
        if time.monotonic() > deadline:
            raise ChaosError(f"{run.folder.name}: ranks outlive their launcher: {run.ranks()}")
        time.sleep(0.1)
    return code


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def faults(quiet: Run, harmed: Run, stages: list[str]) -> list[str]:
    """List how a disturbed run differs from the undisturbed one."""
    found = []
    differences = compare(read_steps(quiet.folder), read_steps(harmed.folder), tolerance=0.0)
    if differences:
        found.append(f"{len(differences)} differences, first: {differences[0].describe()}")
    left, right = read_steps(quiet.folder), read_steps(harmed.folder)
    norms = [key for key in left if left[key]["grad_norm"] != right.get(key, {}).get("grad_norm")]
    found += [f"gradient norm of {stage} step {step} differs" for stage, step in norms[:1]]
    for stage in stages:
        if records(quiet, stage) != records(harmed, stage):
            found.append(f"records of {stage} were lost or repeated")
        if weights(quiet, stage) != weights(harmed, stage):
            found.append(f"final weights of {stage} differ")
    return found


def records(run: Run, stage: str) -> list[object]:
    """Return the records of each step of a stage."""
    return [line["records"] for line in read_json_lines(run.folder / f"samples/{stage}.jsonl")]


def weights(run: Run, stage: str) -> str:
    """Return the digest of a stage's final weights."""
    newest = step_folders(run.folder, stage=stage)[0]
    return hashlib.sha256((newest / "weights.safetensors").read_bytes()).hexdigest()


def show(tally: Tally, *, seconds: float) -> None:
    """Print what was done, by kind and moment, and the verdict."""
    print(f"\n{'deaths':28s}" + "".join(f"{moment:>18s}" for moment in MOMENTS) + f"{'in all':>8s}")
    for kind in KINDS:
        row = [tally.deaths[kind, moment] for moment in MOMENTS]
        print(f"{kind:28s}" + "".join(f"{n:18d}" for n in row) + f"{sum(row):8d}")
    total = sum(tally.deaths.values())
    print(
        f"\n{total} deaths in {tally.rounds} runs, {tally.starts} starts of the launcher, "
        f"{seconds / 60:.1f} minutes"
    )
    for fault in tally.faults:
        print(f"FAULT  {fault}")
    if not tally.faults:
        print("every run ended bit-identical to the undisturbed one; no record lost or repeated")


if __name__ == "__main__":
    sys.exit(main())
