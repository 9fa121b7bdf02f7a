"""What saving costs training: ours beside torch.save, DeepSpeed's own, and torch DCP, in one run.

    python tools/bench_checkpoint.py                              # 2 ranks, 0.3 GB of state
    python tools/bench_checkpoint.py --repeats 7 model.random.num_layers=16

The arms alternate in the same processes, on the same engine and the same bytes: float32 weights and
AdamW moments of this rank. `blocked` is how long training stands still; `durable` is when the
checkpoint could be used after a crash. While ours and DCP write, training goes on, and its steps
are timed against steps without a save. The tables go to benchmarks/checkpoint_cpu.{md,json}.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGE = "contrastive"
MODEL = (
    "model.random.hidden_size=512",
    "model.random.num_layers=6",
    "model.random.intermediate_size=1408",
    f"stages.{STAGE}.init_from=model",
    f"stages.{STAGE}.steps=1000000",
)
OUT = Path(__file__).parents[1] / "benchmarks"
LABELS = {
    "ours": "cocoa_dist (thread)",
    "ours_process": "the same, another process writes",
    "torch_save": "torch.save",
    "torch_save_fsync": "torch.save and fsync",
    "deepspeed": "DeepSpeed save_checkpoint",
    "dcp": "torch DCP async_save",
}
TARGET_OF_TORCH_SAVE, TARGET_OF_INTERVAL = 0.15, 0.01


def main() -> int:
    """Run the ranks, then print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=int, default=100, help="steps between two saves")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker:
        return worker(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ranks = run_ranks(Path(folder), arguments.nproc)
    result = summarise(ranks, arguments)
    text = table(result)
    print(text)
    OUT.mkdir(exist_ok=True)
    (OUT / "checkpoint_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (OUT / "checkpoint_cpu.md").write_text(text)
    return 0


def run_ranks(folder: Path, count: int) -> list[dict[str, Any]]:
    """Start the ranks and return what each measured."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(count):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(folder)]
        with (folder / f"{rank}.log").open("w") as log:
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.kill()
    if any(codes):
        logs = (folder / f"{codes.index(next(filter(None, codes)))}.log").read_text()
        raise SystemExit(f"the ranks ended with {codes}:\n{logs[-3000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


class Bench:
    """One rank's engine, and the arms on it. Collective: every method, on all ranks."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        """Build the engine and train until AdamW has its moments."""
        import torch
        import torch.distributed as dist

        from cocoa_dist import distributed
        from cocoa_dist.config import load_recipe
        from cocoa_dist.train.build import build_parts, first_steps
        from cocoa_dist.train.checkpoint import Checkpointer
        from cocoa_dist.train.session import _template, build_engine, quiet_known_warnings

        quiet_known_warnings()
        torch.set_num_threads(1)
        world = distributed.start(timeout_seconds=600)
        self.rank, self.folder = world.rank, folder
        config = load_recipe("debug", [*MODEL, *overrides])
        parts = build_parts(config, STAGE, run_dir=None)
        self.template = _template(config, STAGE, parts, run_dir=folder, world_size=world.size)
        self.engine = build_engine(config, STAGE, parts)
        first = first_steps(config, STAGE, parts, rank=world.rank, world_size=world.size)
        self.packs = first[0].packs
        self.step_number = 0
        self.checkpointer = Checkpointer(folder, stage=STAGE, keep_last=1)
        self.group = dist.new_group(backend="gloo")
        for _ in range(2):
            self.step()
        self.checkpointer.prepare(self.engine)
        self.process = WriterProcess()

    def step(self) -> float:
        """Train one step; returns its seconds."""
        begin = time.monotonic()
        self.step_number += 1
        self.engine.train_step(self.packs, step=self.step_number)
        return time.monotonic() - begin

    def live(self) -> dict[str, Any]:
        """Return this rank's state, not copied."""
        from cocoa_dist.train.zero_state import parameter_slices

        slices = parameter_slices(self.engine.deepspeed, self.engine.module)
        return {f"{kind}/{part.name}": v for part in slices for kind, v in part.values.items()}

    def ours(self) -> dict[str, Any]:
        """Train on while a thread copies and writes, commit at a boundary."""
        manifest = self.template.model_copy(update={"step": self.step_number})
        self.checkpointer.begin(self.engine, manifest)
        first = self.checkpointer.take_numbers().blocked_seconds
        steps = []
        while self.checkpointer._pending is not None:
            steps.append(self.step())
            self.checkpointer.poll()
        rest = self.checkpointer.take_numbers()
        durable = rest.seconds if self.rank == 0 else 0.0  # rank 0 renames
        blocked = first + rest.blocked_seconds
        return {"blocked": blocked, "durable": durable, "steps": steps}

    def ours_process(self) -> dict[str, Any]:
        """Copy into shared memory; a process of its own hashes, writes and syncs."""
        begin = time.monotonic()
        self.process.start(self.live(), self.folder / f"process{self.rank}.bin")
        blocked = time.monotonic() - begin
        steps: list[float] = []
        return self.train_until(self.process.done, begin, blocked, steps)

    def torch_save(self, *, sync: bool = False) -> dict[str, Any]:
        """Write the live tensors at once; `sync` waits for the disk as well."""
        import torch

        begin = time.monotonic()
        with (self.folder / f"plain{self.rank}.pt").open("wb") as file:
            torch.save(self.live(), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        blocked = time.monotonic() - begin
        return {"blocked": blocked, "durable": blocked if sync else None, "steps": []}

    def torch_save_fsync(self) -> dict[str, Any]:
        """Write the live tensors at once and wait for the disk."""
        return self.torch_save(sync=True)

    def deepspeed(self) -> dict[str, Any]:
        """Let DeepSpeed write its shards, as it comes."""
        begin = time.monotonic()
        self.engine.deepspeed.save_checkpoint(
            str(self.folder / "deepspeed"), tag="t", save_latest=False
        )
        return {"blocked": time.monotonic() - begin, "durable": None, "steps": []}

    def dcp(self) -> dict[str, Any]:
        """Let torch's distributed checkpoint stage and write in its thread, on its own group."""
        import torch.distributed.checkpoint as dcp

        begin = time.monotonic()
        state = {f"rank{self.rank}/{name}": value for name, value in self.live().items()}
        future = dcp.async_save(
            state, checkpoint_id=str(self.folder / "dcp"), process_group=self.group
        )
        blocked = time.monotonic() - begin
        steps: list[float] = []
        return self.train_until(future.done, begin, blocked, steps)

    def train_until(
        self, done: Callable[[], bool], begin: float, blocked: float, steps: list[float]
    ) -> dict[str, Any]:
        """Train on until every rank is done."""
        import torch

        from cocoa_dist.distributed import sum_over_ranks, world_size

        while True:
            steps.append(self.step())
            if sum_over_ranks(torch.tensor(float(done()))).item() == world_size():
                return {"blocked": blocked, "durable": time.monotonic() - begin, "steps": steps}


_WRITER = """
import hashlib, mmap, os, sys
for line in sys.stdin:
    source, size, target = line.rstrip("\\n").split("|")
    with open(source, "r+b") as file, mmap.mmap(file.fileno(), int(size)) as block:
        digest, view = hashlib.sha256(), memoryview(block)
        with open(target, "wb") as out:
            for begin in range(0, len(view), 2**22):
                chunk = view[begin:begin + 2**22]
                digest.update(chunk)
                out.write(chunk)
                chunk.release()
            out.flush()
            os.fsync(out.fileno())
        view.release()
    print(digest.hexdigest(), flush=True)
"""


class WriterProcess:
    """Writes a shared block to a file, without torch: the smallest process that could do it."""

    def __init__(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-S", "-c", _WRITER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.child.stdout is not None
        os.set_blocking(self.child.stdout.fileno(), False)
        self.block: Any = None
        self.finished = True
        self.shared = tempfile.NamedTemporaryFile(dir="/dev/shm")

    def start(self, tensors: dict[str, Any], target: Path) -> None:
        """Copy and hand over."""
        import torch

        self.finished = False
        size = sum(value.nbytes for value in tensors.values())
        if self.block is None:
            os.truncate(self.shared.name, size)
            self.block = torch.from_file(
                self.shared.name, shared=True, size=size, dtype=torch.uint8
            ).fill_(0)
        begin = 0
        for value in tensors.values():
            self.block[begin : begin + value.nbytes].view(value.dtype).copy_(value)
            begin += value.nbytes
        assert self.child.stdin is not None
        self.child.stdin.write(f"{self.shared.name}|{size}|{target}\n")
        self.child.stdin.flush()

    def done(self) -> bool:
        """Whether it has written; once true it stays so until the next start."""
        assert self.child.stdout is not None
        self.finished = self.finished or bool(self.child.stdout.readline())
        return self.finished


def worker(arguments: argparse.Namespace) -> int:
    """One rank: every arm in turn, as often as asked for."""
    from cocoa_dist import distributed

    bench = Bench(Path(arguments.worker), arguments.overrides)
    size = sum(value.nbytes for value in bench.live().values())
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in LABELS}
    quiet: list[float] = []
    for repeat in range(arguments.repeats + 1):  # the first one warms up caches and memory
        arms = list(LABELS)
        for arm in [*arms[repeat % len(arms) :], *arms[: repeat % len(arms)]]:
            shutil.rmtree(bench.folder / "dcp", ignore_errors=True)
            os.sync()  # or an arm that syncs pays for what one that does not has left
            distributed.barrier()
            steps = [bench.step() for _ in range(3)]
            run = getattr(bench, arm)()
            if repeat:
                quiet += steps
                runs[arm].append(run)
    bench.process.child.kill()
    content = {"bytes": size, "runs": runs, "quiet_steps": quiet}
    (bench.folder / f"{bench.rank}.json").write_text(json.dumps(content))
    distributed.stop()
    return 0


def summarise(ranks: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats; of the ranks the slowest, for which the others wait."""
    arms: dict[str, dict[str, float | None]] = {}
    step = statistics.median(seconds for rank in ranks for seconds in rank["quiet_steps"])
    for arm in LABELS:
        repeats = list(zip(*(rank["runs"][arm] for rank in ranks), strict=True))
        durable = [[run["durable"] for run in repeat] for repeat in repeats]
        steps = [seconds for repeat in repeats for run in repeat for seconds in run["steps"]]
        arms[arm] = {
            "blocked_seconds": statistics.median(max(r["blocked"] for r in rs) for rs in repeats),
            "durable_seconds": None
            if durable[0][0] is None
            else statistics.median(max(seconds) for seconds in durable),
            "step_seconds_while_saving": statistics.median(steps) if steps else None,
        }
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "ranks": len(ranks),
        "bytes_per_rank": ranks[0]["bytes"],
        "repeats": arguments.repeats,
        "every_steps": arguments.every,
        "step_seconds": step,
        "arms": arms,
        "runs": [rank["runs"] for rank in ranks],
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    arms, step = result["arms"], result["step_seconds"]
    reference = arms["torch_save"]["blocked_seconds"]
    interval = result["every_steps"] * step
    lines = [
        "# What a save costs training",
        "",
        f"{result['ranks']} ranks, {result['bytes_per_rank'] / 1e6:.0f} MB each (float32 weights "
        f"and AdamW moments), {result['machine']}; medians of {result['repeats']} alternating "
        f"repeats in one run of `tools/bench_checkpoint.py`. A step takes {step:.2f} s; a save "
        f"every {result['every_steps']} steps.",
        "",
        "| arm | training stands still | of torch.save | of the interval | durable after "
        "| a step meanwhile |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, label in LABELS.items():
        figures = arms[arm]
        blocked = figures["blocked_seconds"]
        durable, slow = figures["durable_seconds"], figures["step_seconds_while_saving"]
        lines.append(
            f"| {label} | {1e3 * blocked:.0f} ms | {100 * blocked / reference:.0f} % "
            f"| {100 * blocked / interval:.2f} % "
            f"| {'not said' if durable is None else f'{durable:.2f} s'} "
            f"| {'-' if slow is None else f'{slow:.2f} s'} |"
        )
    share = arms["ours"]["blocked_seconds"] / reference
    part = arms["ours"]["blocked_seconds"] / interval
    lines += [
        "",
        f"Targets: at most {100 * TARGET_OF_TORCH_SAVE:.0f} % of torch.save "
        f"({'met' if share <= TARGET_OF_TORCH_SAVE else 'missed'}: {100 * share:.1f} %), under "
        f"{100 * TARGET_OF_INTERVAL:.0f} % of the interval "
        f"({'met' if part < TARGET_OF_INTERVAL else 'missed'}: {100 * part:.2f} %).",
        "",
        "torch.save and DeepSpeed write into the page cache and say nothing about the disk; ours "
        "and `fsync` are durable, hashed (ours) and committed by a manifest (ours). Ours counts "
        "all that training waits for: the start of the save, what is left of the copy when the "
        "next optimizer step is due (it runs beside the passes before it), and every "
        "step boundary until the end. It is durable late because ranks agree at boundaries: one to "
        "tell that all is written, one to read it.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
