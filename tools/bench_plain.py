"""What a step costs under ZeRO-3 against a plain loop in one process, both in one run.

    python tools/bench_plain.py quickstart --stage contrastive
    python tools/bench_plain.py quickstart --stage joint_reconstruction --nproc 2 --repeats 5

The two arms alternate, each in fresh processes, on the same model, records and batch. Quoted in
samples per CPU second over all processes, data loading included; on a shared machine the ratio is
worth more than either number. The rest of the table says where ZeRO-3's time goes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ranks_of_a_bench import run_ranks

WARM_UP_STEPS = 5


def main() -> int:
    """Run both arms in turn and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--stage", default="contrastive")
    parser.add_argument("--nproc", type=int, default=2, help="processes of the ZeRO-3 arm")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker:
        return worker(json.loads(arguments.worker))
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "zero3": []}
    for repeat in range(arguments.repeats):
        for arm, processes in (("plain", 1), ("zero3", arguments.nproc)):
            runs[arm].append(measure(arm, processes, arguments))
            rate = runs[arm][-1]["samples_per_cpu_second"]
            print(f"repeat {repeat + 1}: {arm} {rate:.0f} samples per CPU second", flush=True)
    report(runs, arguments)
    return 0


def measure(arm: str, processes: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one arm in fresh processes; figures are sums over its processes."""
    job = {
        "arm": arm,
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "stage": arguments.stage,
        "steps": arguments.steps,
    }
    parts = run_ranks(job, ranks=processes, script=__file__)
    total: dict[str, float] = {key: sum(part[key] for part in parts) for key in parts[0]}
    total["samples_per_cpu_second"] = total["samples"] / total["cpu_seconds"]
    total["samples_per_second"] = total["samples"] / max(part["seconds"] for part in parts)
    return total


def worker(job: Mapping[str, Any]) -> int:
    """One process of one arm."""
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.runtime import seed_everything
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.session import build_engine, quiet_known_warnings

    overrides = [f"stages.{job['stage']}.init_from={FROM_MODEL}", *job["overrides"]]
    config = load_recipe(job["recipe"], overrides)
    quiet_known_warnings()
    torch.set_num_threads(config.runtime.threads)
    world = distributed.start(timeout_seconds=config.engine.timeout_seconds)
    seed_everything(config.seed)
    parts = build_parts(config, job["stage"], run_dir=None)
    collectives = Collectives()
    if job["arm"] == "plain":
        step = plain_step(config, job["stage"], parts)
    else:
        engine = build_engine(config, job["stage"], parts)
        collectives.watch()

        def step(packs: Any, number: int) -> None:
            engine.train_step(packs, step=number)

    with tempfile.TemporaryDirectory() as folder:
        loader = StageLoader(
            config,
            job["stage"],
            vocabulary=parts.vocabulary,
            geometry=parts.geometry,
            rank=world.rank,
            world_size=world.size,
            start_step=1,
            folder=Path(folder),
        )
        figures = run_steps(loader, step, collectives, job["steps"])
        loader.close()
    Path(job["output"]).write_text(json.dumps(figures))
    distributed.stop()
    return 0


def run_steps(
    loader: Any, step: Callable[[Any, int], None], collectives: "Collectives", count: int
) -> dict[str, float]:
    """Time `count` steps after a warm-up; CPU seconds of this process, and its samples."""
    samples = data_cpu = 0.0
    begin = cpu_begin = 0.0
    for number in range(1, WARM_UP_STEPS + count + 1):
        if number == WARM_UP_STEPS + 1:
            begin, cpu_begin = time.monotonic(), time.process_time()
            samples = data_cpu = 0.0
            collectives.reset()
        data_begin = time.process_time()
        batch = loader.next_step()
        data_cpu += time.process_time() - data_begin
        step(batch.packs, number)
        samples += batch.num_samples
    return {
        "samples": samples,
        "seconds": time.monotonic() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
        "data_cpu_seconds": data_cpu,
        "collective_cpu_seconds": collectives.cpu_seconds,
        "collectives": collectives.calls,
        "collective_bytes": collectives.bytes,
    }


def plain_step(config: Any, stage_name: str, parts: Any) -> Callable[[Any, int], None]:
    """Return the step of a plain loop: the same model and objective, AdamW, one process."""
    import torch

    from cocoa_dist.train.engine import learning_rate_at

    stage = config.stages[stage_name]
    optimizer = torch.optim.AdamW(parts.model.parameters(), lr=stage.optimizer.learning_rate)

    def step(packs: Any, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(number, stage.optimizer, total_steps=stage.steps)
        counts = parts.objective.counts(packs)
        sums = parts.objective.sums([parts.model(pack) for pack in packs], packs)
        loss = sum(parts.objective.weights[n] * sums[n] / max(counts[n], 1.0) for n in sums)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), stage.optimizer.max_grad_norm)
        optimizer.step()

    return step


class Collectives:
    """Counts our own collectives, with bytes and CPU seconds.

    DeepSpeed keeps references of its own to what it calls: those are not seen here.
    """

    NAMES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_gather")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.calls, self.bytes, self.cpu_seconds = 0.0, 0.0, 0.0

    def watch(self) -> None:
        """Put a counter round each collective."""
        import torch.distributed as dist

        for name in self.NAMES:
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            result = function(*args, **kwargs)
            self.cpu_seconds += time.process_time() - begin
            self.calls += 1
            first = args[0] if args else next(iter(kwargs.values()))
            tensors = first if isinstance(first, list) else [first]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            return result

        return counted


def report(runs: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Print medians, the ratio of each repeat, and where ZeRO-3's time goes."""

    def median(arm: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[arm])

    ratios = [
        zero3["samples_per_cpu_second"] / plain["samples_per_cpu_second"]
        for plain, zero3 in zip(runs["plain"], runs["zero3"], strict=True)
    ]
    print(f"\n{arguments.recipe}, stage {arguments.stage}, {arguments.steps} steps, medians")
    print("| arm | samples / CPU second | samples / second | CPU ms a step | of it data |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for arm, label in (("plain", "plain loop, 1 process"), ("zero3", f"ZeRO-3, {arguments.nproc}")):
        cpu = 1e3 * median(arm, "cpu_seconds") / arguments.steps
        data = 1e3 * median(arm, "data_cpu_seconds") / arguments.steps
        print(
            f"| {label} | {median(arm, 'samples_per_cpu_second'):.0f} "
            f"| {median(arm, 'samples_per_second'):.0f} | {cpu:.0f} | {data:.0f} |"
        )
    calls = median("zero3", "collectives") / arguments.nproc / arguments.steps
    size = median("zero3", "collective_bytes") / arguments.nproc / arguments.steps / 2**20
    cpu = 1e3 * median("zero3", "collective_cpu_seconds") / arguments.steps
    print(
        f"ratio of each repeat: {', '.join(f'{100 * r:.0f} %' for r in ratios)}; "
        f"median {100 * statistics.median(ratios):.0f} %"
    )
    print(
        f"our own collectives (losses, counts, embeddings; not DeepSpeed's gathers): {calls:.0f} "
        f"calls and {size:.1f} MiB a rank and step, {cpu:.0f} CPU ms over all ranks"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
