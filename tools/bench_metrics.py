"""What a run's telling about itself costs: steps of `debug` with and without all of it.

    python tools/bench_metrics.py                    # every stage, 20 pairs of blocks of 10 steps
    python tools/bench_metrics.py --stage contrastive --pairs 40

Two ranks do blocks of steps with everything on (exporter that is scraped, diary, measures of
objective and groups of parameters, FLOPs, looking for requests) and with all of it taken out, in
turns; metrics.jsonl is written in both. Two figures, in CPU time of rank 0: what was spent inside
the parts, timed where they are called, and the difference of blocks next to each other, all threads
included, which a busy machine blurs. The table goes to benchmarks/metrics_cpu.{md,json}.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

OUT = ROOT / "benchmarks" / "metrics_cpu"
RANKS = 2
AS_RANK = "--as-rank"
LIMIT = 0.005  # of a step, what it may cost
SCRAPER = """
import sys, urllib.request
for line in sys.stdin:
    size = len(urllib.request.urlopen(line.strip(), timeout=10).read())
    print(size, flush=True)
"""


class Nothing:
    """A monitor, and tracing, that does nothing."""

    def phase(self, name: str) -> Any:
        """Be in a phase."""
        return nullcontext()

    def asked(self) -> int:
        """Nobody asks."""
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@dataclass(frozen=True)
class Row:
    """One stage; CPU milliseconds of a step on rank 0."""

    stage: str
    without: float  # median of blocks
    inside: dict[str, float]  # by part, mean over steps
    difference: float  # median over neighbours
    error: float  # standard error of their mean

    @property
    def share(self) -> float:
        """What was spent inside the parts over a step without them."""
        return sum(self.inside.values()) / self.without


class Timers:
    """CPU time of this thread inside functions, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, part: str, holder: Any, name: str) -> None:
        """Time a method of an object."""
        inner = getattr(holder, name)

        def timed(*values: Any, **more: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*values, **more)
            finally:
                spent = time.thread_time() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

        setattr(holder, name, timed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; 1 if it costs more than LIMIT."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", action="append", help="only this one (may be given again)")
    parser.add_argument("--pairs", type=int, default=20, help="of blocks (default: 20)")
    parser.add_argument("--steps", type=int, default=10, help="of a block (default: 10)")
    parser.add_argument("--out", type=Path, default=OUT, help="without its ending")
    parser.add_argument(AS_RANK, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min(arguments.pairs, arguments.steps) < 2:
        parser.error(f"--pairs {arguments.pairs} --steps {arguments.steps}: at least 2 of each")
    if arguments.as_rank is not None:
        _rank(arguments)
        return 0
    rows = _measure(sys.argv[1:] if argv is None else argv)
    text = table(rows, pairs=arguments.pairs, steps=arguments.steps)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    fields = [asdict(row) for row in rows]
    arguments.out.with_suffix(".json").write_text(json.dumps(fields, indent=1) + "\n")
    print(text)
    return int(any(row.share > LIMIT for row in rows))


def _measure(arguments: Sequence[str]) -> list[Row]:
    """Start the ranks and read what rank 0 has measured."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        environment = {
            **os.environ,
            **{"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        }
        command = [sys.executable, __file__, *arguments, AS_RANK, folder]
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(RANKS)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        fields = json.loads((Path(folder) / "rows.json").read_text())
    return [Row(**row) for row in fields]


def _rank(arguments: argparse.Namespace) -> None:
    """Measure every stage; rank 0 writes what it found."""
    from cocoa_dist import distributed
    from cocoa_dist.config import load_recipe
    from cocoa_dist.train.session import import_engine, quiet_known_warnings

    quiet_known_warnings()
    import_engine(load_recipe("debug"))
    import torch

    torch.set_num_threads(1)
    world = distributed.start(timeout_seconds=600)
    rows = []
    for stage in arguments.stage or list(load_recipe("debug").stages):
        folder = arguments.as_rank / stage
        rows.append(_stage(stage, folder, world, pairs=arguments.pairs, steps=arguments.steps))
    if world.rank == 0:
        text = json.dumps([asdict(row) for row in rows])
        (arguments.as_rank / "rows.json").write_text(text)
    distributed.stop()


def _stage(stage: str, folder: Path, world: Any, *, pairs: int, steps: int) -> Row:
    run = _stage_run(stage, folder, world)
    timers = Timers()
    run.flops = SimpleNamespace(of_packs=run.flops.of_packs)  # a frozen class cannot be wrapped
    for part, holder, name in (
        ("exporter and diary", run.monitor, "step"),
        ("exporter and diary", run.monitor, "record"),
        ("groups of parameters", run.engine, "_group_sums"),
        ("measures of the objective", run.engine.objective, "_measure"),
        ("FLOPs and requests", run.flops, "of_packs"),
        ("FLOPs and requests", run.profiling, "asked"),
        ("FLOPs and requests", run.profiling, "begin"),
        ("FLOPs and requests", run.profiling, "end"),
    ):
        if hasattr(holder, name):
            timers.wrap(part, holder, name)
    monitor, step, without, differences = run.monitor, 0, [], []
    objective = run.engine.objective
    measures = getattr(objective, "_measure", None)
    on_state = (run.monitor, run.profiling, run.engine.measure_every, run.flops)
    with run.watchdog, _scraper() as scrape:
        for pair in range(pairs + 1):  # the first warms up
            found = {}
            for on in (True, False) if pair % 2 else (False, True):
                state = on_state if on else (Nothing(), Nothing(), 0, None)
                run.monitor, run.profiling, run.engine.measure_every, run.flops = state
                if measures is not None:
                    objective._measure = measures if on else lambda *_: None
                began = time.process_time()
                for _ in range(steps):
                    step += 1
                    run._one_step(step)
                if on:
                    scrape(monitor.exporter.port)
                found[on] = (time.process_time() - began) / steps * 1e3
            if not pair:
                timers.seconds.clear()
                continue
            without.append(found[False])
            differences.append(found[True] - found[False])
    monitor.stop()
    run.loader.close()
    return Row(
        stage=stage,
        without=statistics.median(without),
        inside={name: s / (pairs * steps) * 1e3 for name, s in timers.seconds.items()},
        difference=statistics.median(differences),
        error=statistics.stdev(differences) / len(differences) ** 0.5,
    )


def _stage_run(stage: str, folder: Path, world: Any) -> Any:
    """Build a stage as a session does."""
    from cocoa_dist.config import load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.monitor import Monitor
    from cocoa_dist.runtime import StopRequest, seed_everything
    from cocoa_dist.train import session
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.checkpoint import Checkpointer
    from cocoa_dist.train.loop import Progress, StageRun
    from cocoa_dist.train.resources import StepFlops

    config = load_recipe(
        "debug",
        [
            *(f"stages.{stage}.init_from=model", f"stages.{stage}.steps=1000000"),
            *("checkpoint.every_steps=1000000", "guards.spike_deviations=1000000"),
        ],
    )
    folder.mkdir(exist_ok=True)
    ranks = {"rank": world.rank, "world_size": world.size}
    monitor = Monitor.start(config, stage, run_dir=folder, epoch="", **ranks)
    seed_everything(config.seed)
    parts = build_parts(config, stage, run_dir=folder)
    loader = StageLoader(
        config,
        stage,
        vocabulary=parts.vocabulary,
        geometry=parts.geometry,
        start_step=1,
        folder=folder / "data",
        **ranks,
    )
    flops = StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )
    template = session._template(config, stage, parts, run_dir=folder, world_size=world.size)
    checkpointer = Checkpointer(
        folder, stage=stage, keep_last=1, adapter=None, max_failed_saves=0, recipe=""
    )
    return StageRun(
        config,
        stage,
        run_dir=folder,
        engine=session.build_engine(config, stage, parts),
        loader=loader,
        checkpointer=checkpointer,
        template=template,
        progress=Progress(),
        stop=StopRequest(),
        monitor=monitor,
        flops=flops,
    )


@contextmanager
def _scraper() -> Iterator[Any]:
    """Give a function that has another process scrape a port."""
    command = [sys.executable, "-c", SCRAPER]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    asked, answers = child.stdin, child.stdout

    def scrape(port: int | None) -> None:
        asked.write(f"http://127.0.0.1:{port}/metrics\n")
        asked.flush()
        assert int(answers.readline()) > 1000

    try:
        yield scrape
    finally:
        asked.close()
        child.wait(timeout=20)
        answers.close()


def table(rows: Sequence[Row], *, pairs: int, steps: int) -> str:
    """Return the page."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    parts = list(dict.fromkeys(part for row in rows for part in row.inside))
    lines = [
        "# What telling about a run costs\n",
        f"`debug` on {RANKS} ranks, CPU milliseconds of a step on rank 0, which tells most: "
        f"{pairs} pairs of neighbouring blocks of {steps} steps, with everything on and with all "
        "of it taken out; sinks off, metrics.jsonl written in both. The parts are timed where "
        "they are called; groups of parameters are measured every 20 steps, the default. The "
        "difference is the median over pairs, all threads and one scrape a block included, with "
        "the standard error of its mean: other work on the machine blurs it. "
        f"python {platform.python_version()}, {libraries}. Made by "
        "`python tools/bench_metrics.py`.\n",
        f"| stage | step without | {' | '.join(parts)} | in all | share | difference |",
        f"| --- |{' ---: |' * (len(parts) + 4)}",
    ]
    for row in rows:
        inside = " | ".join(f"{row.inside.get(part, 0.0):.3f}" for part in parts)
        lines.append(
            f"| {row.stage} | {row.without:.1f} | {inside} | {sum(row.inside.values()):.3f} "
            f"| {row.share:.2%} | {row.difference:.2f} +- {row.error:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
