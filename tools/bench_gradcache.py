"""What GradCache costs and saves: CPU time, memory and bytes sent, against keeping all forwards.

    python tools/bench_gradcache.py
    python tools/bench_gradcache.py --batches 64 256 --repeats 5 --out benchmarks/gradcache_cpu

Every figure is of one contrastive step of two ranks under ZeRO-3; the arms take turns in the same
processes, each with an engine of its own. Time: CPU seconds of all ranks. Memory: the most a rank's
resident memory grows within a step, beyond weights, optimizer and the batch itself (Linux). Sent:
bytes a rank sends in a step with ring algorithms, DeepSpeed's collectives and ours. Writes OUT.md
and OUT.json.
"""

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

STAGE = "contrastive"
MIB = 2**20
TARGET_RATIO = 1.4
TARGET_GROWTH = 1.25  # of memory from the smallest to the largest batch: flat
_PRIVATE = 64 * 1024  # blocks from this size on go back to the system when freed


@dataclass(frozen=True)
class Arm:
    """One way to run the step."""

    name: str
    cache: str  # never or always
    reduction: str = "boundary"
    threshold: str = "0"  # parameters kept gathered: up to so many elements, or `resident`

    def overrides(self, folder: Path) -> list[str]:
        """Return recipe overrides; the threshold is mechanics, so it goes into a file."""
        from cocoa_dist.train.ds_config import read_ds_config

        resident = self.threshold == "resident"
        mechanics = read_ds_config("zero3_cpu")
        if not resident:
            mechanics["zero_optimization"]["stage3_param_persistence_threshold"] = int(
                self.threshold
            )
        path = folder / f"zero3_{self.threshold}.json"
        path.write_text(json.dumps(mechanics))
        return [
            f"stages.{STAGE}.objective.grad_cache.mode={self.cache}",
            f"engine.reduction={self.reduction}",
            f"engine.resident_parameters={str(resident).lower()}",
            f"engine.ds_config={path}",
        ]


PLAIN = Arm("all forwards kept", cache="never")
CACHED = Arm("GradCache", cache="always")
USUAL_KEYS = ("always", "boundary", "resident")  # what the defaults come to
THRESHOLDS = ("0", "10000", "resident")
TRAFFIC = (
    *(Arm(f"all forwards kept, {t}", "never", "boundary", t) for t in THRESHOLDS),
    *(
        Arm(f"GradCache, {reduction}, {t}", "always", reduction, t)
        for reduction in ("boundary", "coalesce")
        for t in THRESHOLDS
    ),
)
USUAL = next(a for a in TRAFFIC if (a.cache, a.reduction, a.threshold) == USUAL_KEYS)


def main() -> int:
    """Run all arms and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--time-batch", type=int, default=256, help="batch of the other two tables")
    parser.add_argument("--tokens-per-pack", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gradcache_cpu"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(Path(arguments.worker))
    turns = [(arm, arguments.time_batch) for _ in range(arguments.repeats) for arm in TRAFFIC]
    turns += [(arm, batch) for batch in arguments.batches for arm in (PLAIN, CACHED)]
    found = measure(turns, arguments)
    time_runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in TRAFFIC}
    for (arm, _), run in zip(turns, found[: arguments.repeats * len(TRAFFIC)], strict=False):
        time_runs[arm.name].append(run)
    memory: dict[str, dict[str, Any]] = {str(batch): {} for batch in arguments.batches}
    for (arm, batch), run in list(zip(turns, found, strict=True))[-2 * len(memory) :]:
        memory[str(batch)][arm.name] = run
    figures = {
        "time": time_runs,
        "memory": memory,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {versions()}",
        "settings": {k: str(v) for k, v in vars(arguments).items() if k not in ("worker", "out")},
    }
    text = tables(figures, arguments)
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(text + "\n")
    return 0


def versions() -> str:
    """Return the versions that decide the figures."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))


def measure(turns: list[tuple[Arm, int]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run (arm, batch) by turns; CPU seconds are sums over ranks, the rest is of rank 0."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [
            {
                "name": f"{arm.name}, batch {batch}",
                "steps": arguments.steps,
                "recipe": arguments.recipe,
                "overrides": [
                    *arm.overrides(folder),
                    f"stages.{STAGE}.batch_size={batch}",
                    f"data.tokens_per_pack={arguments.tokens_per_pack}",
                ],
            }
            for arm, batch in turns
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_ranks(folder, arguments.nproc)
        parts = [json.loads((folder / f"{r}.json").read_text()) for r in range(arguments.nproc)]
    return [
        {**ranks[0], "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks)}
        for ranks in zip(*parts, strict=True)
    ]


def run_ranks(folder: Path, nproc: int) -> None:
    """Start the ranks and wait for them; rank 0 says on stdout how far it is."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(nproc):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(_PRIVATE),
            "MALLOC_TRIM_THRESHOLD_": str(_PRIVATE),
        }
        command = [sys.executable, __file__, "--worker", str(folder)]
        with (folder / f"{rank}.log").open("w") as log:
            out = None if rank == 0 else log
            children.append(subprocess.Popen(command, env=environment, stdout=out, stderr=log))
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}\n{(folder / '0.log').read_text()[-3000:]}")


def worker(folder: Path) -> int:
    """Run one rank through all turns."""
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.train.session import quiet_known_warnings

    quiet_known_warnings()
    torch.set_num_threads(1)
    world = distributed.start(timeout_seconds=600)
    found = []
    for job in json.loads((folder / "jobs.json").read_text()):
        found.append(run_turn(job, world))
        if world.rank == 0:
            run = found[-1]
            print(
                f"{job['name']}: {run['packs']} packs, {run['cpu_seconds']:.2f} CPU s a step and "
                f"rank, {run['grown'] / MIB:.0f} MiB, sent {run['sent'] / MIB:.1f} MiB",
                flush=True,
            )
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    distributed.stop()
    return 0


def run_turn(job: dict[str, Any], world: Any) -> dict[str, Any]:
    """Train one arm: a step to warm up, one that is counted, and timed ones."""
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.runtime import seed_everything
    from cocoa_dist.train.build import build_parts, first_steps
    from cocoa_dist.train.session import build_engine
    from cocoa_dist.train.traffic import counted_traffic

    config = load_recipe(
        job["recipe"], [f"stages.{STAGE}.init_from={FROM_MODEL}", *job["overrides"]]
    )
    seed_everything(config.seed)
    parts = build_parts(config, STAGE, run_dir=None)
    engine = build_engine(config, STAGE, parts)
    batches = first_steps(
        config, STAGE, parts, count=2 + job["steps"], rank=world.rank, world_size=world.size
    )
    engine.train_step(batches[0].packs, step=1)
    with counted_traffic() as traffic, grown_memory() as memory:
        engine.train_step(batches[1].packs, step=2)
    begin = time.process_time()
    for number, batch in enumerate(batches[2:], start=3):
        engine.train_step(batch.packs, step=number)
    figures = {
        "packs": len(batches[1].packs),
        "cpu_seconds": (time.process_time() - begin) / job["steps"],
        "grown": memory.bytes,
        "sent": traffic.sent(world.size),
        "traffic": asdict(traffic),
        "parameter_bytes": sum(p.ds_numel * 4 for p in engine.module.parameters()),
    }
    engine.deepspeed.destroy()
    del engine, parts, batches
    gc.collect()
    return figures


class grown_memory:  # noqa: N801  # a context manager, used like a function
    """How much this process's resident memory grew at its highest in the block."""

    def __enter__(self) -> "grown_memory":
        Path("/proc/self/clear_refs").write_text("5")  # the highest value starts anew
        self.bytes = -resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes += resident("VmHWM")


def resident(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def tables(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Write what was measured as Markdown, with each target and whether it was met."""
    runs = figures["time"]
    first = runs[TRAFFIC[0].name]
    weights = first[0]["parameter_bytes"]
    lines = [
        "# GradCache on CPU",
        "",
        f"`python tools/bench_gradcache.py --batches {' '.join(map(str, arguments.batches))} "
        f"--repeats {arguments.repeats} --steps {arguments.steps}` on {figures['machine']}; recipe "
        f"{arguments.recipe}, {weights / MIB:.1f} MiB of weights (float32, fully trained), "
        f"{arguments.nproc} ranks over gloo, {arguments.tokens_per_pack} tokens a pack.",
        "",
        f"## Time and bytes at batch {arguments.time_batch}",
        "",
        f"A rank has {first[0]['packs']} packs; a chunk of GradCache is one pack. Ratio: CPU "
        "seconds over those of keeping all forwards at the same threshold, median over repeats "
        "of the ratio within a repeat (smallest to largest). Threshold: parameters of up to so "
        "many elements stay gathered; `resident`: all. Sent: a rank, a step.",
        "",
        "| step | gradients | threshold | CPU s | ratio | gathered MiB | scattered MiB | sent MiB "
        "| collectives |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in TRAFFIC:
        lines.append(time_row(arm, runs[arm.name], runs[base_of(arm)]))
    usual = ratio(runs[USUAL.name], runs[base_of(USUAL)])
    text = f"the recipes' default where weights fit ({USUAL.name}): time {usual:.2f}x"
    lines += ["", verdict(text, usual, TARGET_RATIO)]
    lines += memory_lines(figures["memory"], arguments)
    return "\n".join(lines)


def base_of(arm: Arm) -> str:
    """Return the name of the arm that keeps all forwards, at the same threshold."""
    return next(a.name for a in TRAFFIC if (a.cache, a.threshold) == ("never", arm.threshold))


def ratio(runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> float:
    """Return the median over repeats of this arm's CPU seconds over the base's."""
    pairs = zip(runs, first, strict=True)
    return statistics.median(run["cpu_seconds"] / base["cpu_seconds"] for run, base in pairs)


def time_row(arm: Arm, runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """Return one line of the table of time and bytes."""
    spread = [r["cpu_seconds"] / b["cpu_seconds"] for r, b in zip(runs, first, strict=True)]
    traffic = runs[0]["traffic"]
    gathered = sum(v for k, v in traffic["bytes"].items() if k.startswith("all_gather"))
    scattered = sum(v for k, v in traffic["bytes"].items() if k.startswith("reduce_scatter"))
    cells = [
        "GradCache" if arm.cache == "always" else "all forwards kept",
        arm.reduction if arm.cache == "always" else "one backward",
        arm.threshold,
        f"{statistics.median(run['cpu_seconds'] for run in runs):.2f}",
        f"{ratio(runs, first):.2f} ({min(spread):.2f} to {max(spread):.2f})",
        f"{gathered / MIB:.1f}",
        f"{scattered / MIB:.1f}",
        f"{runs[0]['sent'] / MIB:.1f}",
        str(sum(traffic["calls"].values())),
    ]
    return f"| {' | '.join(cells)} |"


def memory_lines(memory: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Return the table of memory by batch."""
    lines = [
        "",
        "## Memory by batch",
        "",
        "The most that rank 0's resident memory grew within a step, beyond weights, optimizer and "
        "the batch itself (threshold 0, `boundary`).",
        "",
        "| batch | packs a rank | all forwards kept, MiB | GradCache, MiB |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for batch in arguments.batches:
        plain, cached = (memory[str(batch)][arm.name] for arm in (PLAIN, CACHED))
        lines.append(
            f"| {batch} | {plain['packs']} | {plain['grown'] / MIB:.0f} "
            f"| {cached['grown'] / MIB:.0f} |"
        )
    least, most = (
        memory[str(b)][CACHED.name]["grown"]
        for b in (min(arguments.batches), max(arguments.batches))
    )
    growth = most / max(least, 1)
    least_batch, most_batch = min(arguments.batches), max(arguments.batches)
    text = f"GradCache's memory from batch {least_batch} to {most_batch}: {growth:.2f}x"
    return [*lines, "", verdict(text, growth, TARGET_GROWTH)]


def verdict(text: str, found: float, target: float) -> str:
    """Say whether a target was met."""
    return f"**{'PASS' if found <= target else 'FAIL'}** {text} (target: at most {target}x)"


if __name__ == "__main__":
    sys.exit(main())
