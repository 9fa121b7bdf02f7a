"""What a restart costs: from the start of the launcher to the first new step, part by part.

    python tools/bench_restart.py                   # debug on 2 ranks, its first stage, from step 4
    python tools/bench_restart.py --repeats 7 --stage contrastive
    python tools/bench_restart.py --against OTHER   # beside another checkout, taking turns

A run is killed (SIGKILL) behind a checkpoint in the middle of a stage and started again by the same
command; the launcher and its ranks carry a clock that gives every part its own time, imports by
package, without what happened inside it. Figures are CPU seconds of one process, median over the
repeats, of the rank that took longer; `wall` is what passed meanwhile on this machine, which ranks
share with each other. The table goes to benchmarks/restart_cpu.{md,json}.
"""

import sys
import time

_BORN_CPU, _BORN_WALL = time.process_time(), time.monotonic()  # before anything is imported

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import contextmanager, nullcontext  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CODE = "COCOA_RESTART_CODE"  # the checkout that is measured
PROBE = "COCOA_RESTART_PROBE"  # folder for what its launcher and ranks measured
sys.path.insert(0, os.environ.get(CODE, str(ROOT)))  # works in a checkout that is not installed

OUT = ROOT / "benchmarks" / "restart_cpu"
TIMEOUT = 300.0  # seconds until a start is given up
LAUNCHER, RANK = "--as-launcher", "--as-rank"
SMALL_SECONDS = 0.05
# Every part above a second, and why it is still there.
EXPLAINED = {
    "import torch": "`import torch` above one second: half is torch itself; the other half is "
    "torch._dynamo and torch.distributed.tensor with their symbolic shapes, which transformers' "
    "modeling_utils and torch's own optimizers import whether anything is compiled or not. Only a "
    "process forked from one that has them would save it; see DECISIONS.md.",
    "import transformers": "`import transformers` above one second: modeling_utils imports every "
    "quantizer, loss and loading path, and there is no smaller way to a model class.",
}
PACKAGES = (
    *("torch", "deepspeed", "transformers", "megatron", "pydantic", "pyarrow", "scipy", "sympy"),
    *("numpy", "peft", "sklearn", "multistorageclient", "prometheus_client", "rich", "cocoa_dist"),
    *("accelerate", "triton", "huggingface_hub", "PIL", "tokenizers", "launcher"),
)


class Clock:
    """Adds up time by part; a part inside another one is not counted in the outer one."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}  # name -> CPU seconds, wall seconds
        self._open = ["interpreter"]
        self._cpu, self._wall = 0.0, _BORN_WALL
        self._switch(None)

    def _switch(self, name: str | None) -> None:
        """Give the time since the last switch to the innermost open part."""
        cpu, wall = time.process_time(), time.monotonic()
        spent = self.parts.setdefault(self._open[-1], [0.0, 0.0])
        spent[0] += cpu - self._cpu
        spent[1] += wall - self._wall
        self._cpu, self._wall = cpu, wall
        if name is None:
            self._open.pop()
            self._open = self._open or ["between the parts"]
        else:
            self._open.append(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as part `name`."""
        self._switch(name)
        try:
            yield
        finally:
            self._switch(None)

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count every call of a function as part `name`."""
        function = getattr(owner, attribute, None)
        if function is None:  # another checkout, where it had another name
            return

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def watch_imports(self) -> None:
        """Count imports, each package's own code by itself."""
        machinery: Any = sys.modules["_frozen_importlib"]
        load = machinery._find_and_load

        def timed(name: str, import_: Any) -> Any:
            with self.part(f"import {_package(name)}"):
                return load(name, import_)

        machinery._find_and_load = timed

    def write(self, path: Path) -> None:
        """Write what was measured so far."""
        with self.part("the clock itself"):
            pass
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"born": _BORN_WALL, "parts": self.parts}))
        temporary.rename(path)


def _package(name: str) -> str:
    top = name.partition(".")[0]
    if top in PACKAGES:
        return top
    return "the standard library" if top in sys.stdlib_module_names else "other packages"


def as_launcher(arguments: Sequence[str]) -> int:
    """Be the launcher, and write what it took until it has started its first rank."""
    clock = Clock()
    clock.watch_imports()
    from launcher import backend_local
    from launcher.__main__ import main as launch

    folder = Path(os.environ[PROBE])
    start: Callable[..., Any] = backend_local._start_rank

    def starting(*args: Any, **kwargs: Any) -> Any:
        if kwargs["rank"] == 0:
            clock.write(folder / "launcher.json")
        return start(*args, **kwargs)

    backend_local._start_rank = starting
    return launch(arguments, trainer=(sys.executable, __file__, RANK))


def as_rank(arguments: Sequence[str]) -> int:
    """Be a rank, and write what it took until its first step is done."""
    if "RANK" not in os.environ:  # the launcher lets a trainer look at the recipe's inputs first
        from cocoa_dist.train.__main__ import main as look

        return look(arguments)
    clock = Clock()
    clock.watch_imports()
    from cocoa_dist import runtime
    from cocoa_dist.train import __main__ as trainer

    trainer._STOP.install()
    with getattr(runtime, "imports_that_stay", nullcontext)():  # as the trainer itself does
        from cocoa_dist import distributed
        from cocoa_dist.train import checkpoint, engine, loop, resume, session, verify

    for owner, name, part in (
        (distributed, "start", "join the process group"),
        (session.Monitor, "start", "start the monitor"),
        (session, "Checkpointer", "find and verify the checkpoint"),
        (checkpoint.Checkpointer, "find", "find and verify the checkpoint"),
        (verify, "find_newest_whole", "find and verify the checkpoint"),
        (session, "build_parts", "build the model"),
        (session, "StageLoader", "open the data, make the plan"),
        (session, "agree_on_plan", "compare plans and bases"),
        (session, "_template", "compare plans and bases"),
        *(
            (engine, name, "DeepSpeed: settings")
            for name in ("import_deepspeed", "_import_deepspeed")
        ),
        (session, "import_deepspeed", "DeepSpeed: settings"),
        (session, "build_engine", "DeepSpeed: initialize"),
        (resume, "resume", "read the shards"),
        (session, "resume", "read the shards"),
        (loop, "preflight", "pre-flight"),
        (session.StageLoader, "next_step", "first batch"),
    ):
        clock.watch(owner, name, part)
    one_step = loop.StageRun._one_step
    rank = int(os.environ["RANK"])

    def stepping(run: Any, step: int) -> Any:
        with clock.part("first step"):
            asked = one_step(run, step)
        path = Path(os.environ[PROBE]) / f"rank{rank}.json"
        if not path.exists():
            clock.write(path)
        return asked

    loop.StageRun._one_step = stepping  # type: ignore[method-assign]
    return trainer.main(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="debug")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage", default="joint_reconstruction", help="default: %(default)s")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="measured as `before`")
    parser.add_argument("--out", type=Path, default=OUT, metavar="PATH", help="without a suffix")
    options = parser.parse_intermixed_args(argv)
    arms = {"before": options.against.resolve()} if options.against else {}
    with tempfile.TemporaryDirectory(prefix="restart-") as folder:
        samples = measure(Path(folder), options, {**arms, "now": ROOT})
    result = {
        "settings": settings(options),
        "arms": {name: summarise(found) for name, found in samples.items()},
    }
    text = table(result)
    print(text, end="")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    return 0


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured on what."""
    return {
        "recipe": " ".join([options.recipe, *options.overrides]),
        "stage": options.stage,
        "nproc": options.nproc,
        "repeats": options.repeats,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed", "transformers")},
        },
    }


def measure(
    folder: Path, options: argparse.Namespace, arms: dict[str, Path]
) -> dict[str, list[dict[str, Any]]]:
    """Kill a run, restart it again and again from the same checkpoint; what each restart took.

    Every arm is a checkout; they take turns, so that a busy machine is busy for all.
    """
    words = [options.recipe, *options.overrides, "--nproc", str(options.nproc)]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for name, code in arms.items():
        killed = folder / name
        enough = functools.partial(_has_checkpoint, killed, options.stage)
        _run_until(enough, [*words, "--run-dir", str(killed)], probe=folder, code=code)
    for number in range(options.repeats):
        for name, code in arms.items():
            run_dir, probe = folder / "again", folder / f"{name}.{number}"
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(folder / name, run_dir)
            probe.mkdir()
            done = functools.partial(_has_files, probe, options.nproc)
            _run_until(done, [*words, "--run-dir", str(run_dir)], probe=probe, code=code)
            found = {path.stem: json.loads(path.read_text()) for path in probe.glob("*.json")}
            samples[name].append(found)
    return samples


def _has_checkpoint(run_dir: Path, stage: str) -> bool:
    return len(list((run_dir / "checkpoints" / stage).glob("step_*"))) >= 2


def _has_files(probe: Path, nproc: int) -> bool:
    return len(list(probe.glob("rank*.json"))) == nproc


def _run_until(reached: Callable[[], bool], words: list[str], *, probe: Path, code: Path) -> None:
    """Run the launcher until something is there, then kill it and all its ranks."""
    command = [sys.executable, __file__, LAUNCHER, "run", *words]
    environment = {**os.environ, PROBE: str(probe), CODE: str(code), "OMP_NUM_THREADS": "1"}
    log = probe / "launcher.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not reached():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the launcher did not come so far:\n{log.read_text()[-3000:]}")
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)  # its ranks die by the kernel's death signal
        process.wait()
    time.sleep(0.5)


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median over the repeats of every part, launcher and slowest rank apart."""
    launcher = [sample["launcher"]["parts"] for sample in samples]
    ranks = [
        max(
            (sample[name]["parts"] for name in sample if name.startswith("rank")),
            key=lambda parts: sum(cpu for cpu, _ in parts.values()),
        )
        for sample in samples
    ]
    ends = [
        max(
            found["born"] + sum(wall for _, wall in found["parts"].values())
            for name, found in sample.items()
            if name.startswith("rank")
        )
        - sample["launcher"]["born"]
        for sample in samples
    ]
    return {
        "launcher": _medians(launcher),
        "rank": _medians(ranks),
        "wall_seconds": statistics.median(ends),
        "restarts": len(samples),
    }


def _medians(samples: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for parts in samples for name in parts)
    return {
        name: [
            round(statistics.median(parts.get(name, (0.0, 0.0))[i] for parts in samples), 4)
            for i in (0, 1)
        ]
        for name in names
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as markdown."""
    arms, what = result["arms"], result["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in what["versions"].items())
    head = "".join(f" {name} |" for name in arms)
    lines = [
        "# What a restart costs, part by part",
        "",
        f"`{what['recipe']}`, {what['nproc']} ranks on {what['cores']} cores, killed in the middle "
        f"of stage {what['stage']} and started again: from the start of the launcher to the first "
        f"new step. CPU seconds of one process, median of {what['repeats']} restarts, of the rank "
        f"that took longer; a part inside another is not counted twice. {versions}. Made by "
        "`python tools/bench_restart.py`.",
        "",
        f"| part |{head}",
        f"| --- |{' ---: |' * len(arms)}",
    ]
    for who in ("launcher", "rank"):
        lines += [_row(f"**{who}, in all**", [_total(arm[who]) for arm in arms.values()])]
        lines += _rows(who, [arm[who] for arm in arms.values()])
    walls = [f" {arm['wall_seconds']:.1f} |" for arm in arms.values()]
    lines += [f"| wall seconds, machine shared with others |{''.join(walls)}", ""]
    lines += [f"- {EXPLAINED[part]}" for part in _above_a_second(arms["now"]["rank"])]
    return "\n".join(lines) + "\n"


def _rows(who: str, arms: Sequence[dict[str, list[float]]]) -> list[str]:
    """Return the rows of one process, the largest first and the small ones together."""
    names = dict.fromkeys(name for parts in reversed(arms) for name in parts)
    costs = {name: [parts.get(name, (0.0, 0.0))[0] for parts in arms] for name in names}
    small = [name for name in names if max(costs[name]) < SMALL_SECONDS]
    shown = sorted(names.keys() - set(small), key=lambda name: -max(costs[name]))
    rows = [_row(f"{who}: {name}", costs[name]) for name in shown]
    together = [sum(costs[name][i] for name in small) for i in range(len(arms))]
    return [*rows, _row(f"{who}: {len(small)} parts below {SMALL_SECONDS} s each", together)]


def _row(name: str, values: Sequence[float]) -> str:
    return f"| {name} |" + "".join(f" {value:.2f} |" for value in values)


def _total(parts: dict[str, list[float]]) -> float:
    return sum(cpu for cpu, _ in parts.values())


def _above_a_second(parts: dict[str, list[float]]) -> list[str]:
    return [name for name, (cpu, _) in parts.items() if cpu > 1.0]


if __name__ == "__main__":
    _ROLES = {LAUNCHER: as_launcher, RANK: as_rank}
    _ROLE = _ROLES.get(sys.argv[1]) if len(sys.argv) > 1 else None
    sys.exit(_ROLE(sys.argv[2:]) if _ROLE else main())
