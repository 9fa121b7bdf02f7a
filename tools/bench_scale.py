"""Recipes at 64 and 1,024 ranks without a cluster: what can be built, counted and compared.

    python tools/bench_scale.py --out benchmarks/scale_cpu

Two parts. Traffic: bytes and collectives of a step, counted on real processes (gloo) and under
torch's fake process group, which sends nothing, beside what `launcher plan` reckons with. Building:
one rank of a 2B run of 64 or 1,024 ranks, with its engine and its data, in one process: memory it
holds, how even the ranks' work is, and how long it takes. Nothing here is a speed of a cluster.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path[:0] = [str(TOOLS), str(ROOT)]

from bench_step import machine, write_2b  # noqa: E402
from ranks_of_a_bench import run_ranks  # noqa: E402

MIB, GIB = 2**20, 2**30
REAL, FAKE = (1, 2, 4), (4, 64, 1024)
BUILT = (64, 1024)
STEPS_LOOKED_AT = 8
PICTURE = 336 * 336  # pixels, the recipe's largest


@dataclass(frozen=True)
class Setting:
    """A step of debug whose traffic is counted; `records` are a rank's."""

    name: str
    stage: str
    tokens_per_pack: int
    records: int
    overrides: tuple[str, ...]


_JOINT, _PAIRS = "joint_reconstruction", "contrastive"
_GATHERED, _RESIDENT = "engine.resident_parameters=false", "engine.resident_parameters=true"
_CHUNKS = "stages.contrastive.objective.grad_cache.mode=always"
_COALESCE = "engine.reduction=coalesce"
SETTINGS = (
    Setting("one pack, gathered", _JOINT, 512, 8, (_GATHERED,)),
    Setting("packs, gathered, nothing kept", _JOINT, 64, 8, (_GATHERED, "NOTHING_KEPT")),
    Setting("packs, resident, coalesced", _JOINT, 64, 8, (_RESIDENT, _COALESCE)),
    Setting("chunks, gathered", _PAIRS, 64, 8, (_GATHERED, _CHUNKS)),
    Setting("chunks, resident, coalesced", _PAIRS, 64, 8, (_RESIDENT, _COALESCE, _CHUNKS)),
)


def main() -> int:
    """Measure both parts and print or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(json.loads(arguments.worker))
    counted = {f"real {n}": run_ranks({"real": n}, ranks=n, script=__file__)[0] for n in REAL}
    for number in FAKE:
        counted[f"fake {number}"] = run_ranks({"fake": number}, ranks=1, script=__file__)[0]
        print(f"counted {number}", flush=True)
    built = []
    for number in BUILT:
        for stage in (_JOINT, _PAIRS):
            job = {"build": number, "stage": stage}
            built.append(run_ranks(job, ranks=1, script=__file__)[0])
            print(f"built {number} {stage}", flush=True)
    text = report(counted, built, machine("cpu"))
    print(text)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(text + "\n")
        figures = {"machine": machine("cpu"), "counted": counted, "built": built}
        arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def worker(job: dict[str, Any]) -> int:
    """Do one job in this process."""
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.train.session import quiet_known_warnings

    quiet_known_warnings()
    torch.set_num_threads(1)
    if "real" in job:
        distributed.start(timeout_seconds=600)
    else:
        pretend(job.get("fake") or job["build"])
    with tempfile.TemporaryDirectory() as folder:
        found: Any
        if "build" in job:
            found = build(job, Path(folder))
        else:
            found = {s.name: count(s, Path(folder)) for s in SETTINGS}
    Path(job["output"]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    return 0


def pretend(ranks: int) -> None:
    """Be rank 0 of so many, whose collectives return at once and send nothing."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(min(ranks, 8)))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


# --- traffic --------------------------------------------------------------------------------------


def count(setting: Setting, folder: Path) -> dict[str, Any]:
    """Count the third step of a setting, and reckon it as `launcher plan` does."""
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.distributed import rank, world_size
    from cocoa_dist.train.build import build_parts, first_steps
    from cocoa_dist.train.session import build_engine
    from cocoa_dist.train.traffic import counted_traffic
    from launcher.plan.shapes import model_shape
    from launcher.plan.traffic import step_traffic

    ranks = world_size()
    overrides = [
        f"engine.ds_config={nothing_kept(folder)}" if o == "NOTHING_KEPT" else o
        for o in setting.overrides
    ]
    config = load_recipe(
        "debug",
        [
            f"stages.{setting.stage}.init_from={FROM_MODEL}",
            f"stages.{setting.stage}.batch_size={setting.records * ranks}",
            f"data.tokens_per_pack={setting.tokens_per_pack}",
            *overrides,
        ],
    )
    parts = build_parts(config, setting.stage, run_dir=None)
    batches = first_steps(config, setting.stage, parts, count=3, rank=rank(), world_size=ranks)
    engine = build_engine(config, setting.stage, parts)
    for step in (1, 2):
        engine.train_step(batches[step - 1].packs, step=step)
    packs = batches[2].packs
    with counted_traffic() as traffic:
        engine.train_step(packs, step=3)
    planned = step_traffic(
        config,
        setting.stage,
        shape=model_shape(config.model),
        packs=len(packs),
        cards=ranks,
        resident=_RESIDENT in overrides,
    )
    engine.deepspeed.destroy()
    return {
        "packs": len(packs),
        "gathered": traffic.bytes.get("all_gather_into_tensor", 0),
        "reduced": traffic.bytes.get("reduce_scatter_tensor", 0),
        "collectives": sum(traffic.calls.values()),
        "sent": traffic.sent(ranks),
        "planned_gathered": planned.gathered,
        "planned_reduced": planned.reduced,
        "planned_sent": planned.sent,
    }


def nothing_kept(folder: Path) -> Path:
    """Write zero3_cpu so that no weight outlives its use, as in a model much larger than that."""
    from cocoa_dist.train.ds_config import read_ds_config

    mechanics = read_ds_config("zero3_cpu")
    section = {**mechanics["zero_optimization"]}
    section["stage3_max_live_parameters"] = section["stage3_max_reuse_distance"] = 1
    path = folder / "nothing_kept.json"
    path.write_text(json.dumps({**mechanics, "zero_optimization": section}))
    return path


# --- building -------------------------------------------------------------------------------------


def build(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Build rank 0 of a 2B run, and look at the data of all its ranks."""
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.session import build_engine
    from launcher.plan.estimate import estimate
    from launcher.plan.hardware import CARDS, Cluster

    ranks, stage = job["build"], job["stage"]
    batch = max(1024, 4 * ranks)
    config = load_recipe(
        "cocoa_qwen2_vl_2b",
        [
            f"model.path={write_2b(folder / 'model')}",
            "model.tokenizer=asset:tokenizer",
            f"stages.{stage}.init_from={FROM_MODEL}",
            f"stages.{stage}.adapter=null",
            f"stages.{stage}.batch_size={batch}",
            f"stages.{stage}.data.keywords=sample",
            f"stages.{stage}.data.sources={{emoji: {{path: 'asset:emoji/train'}}}}",
            f"data.image={{min_pixels: {PICTURE}, max_pixels: {PICTURE}}}",
            "data.num_workers=0",
            "data.max_text_tokens=32",
            "engine.resident_parameters=false",
        ],
    )
    before = resident_bytes()
    begin = time.monotonic()
    parts = build_parts(config, stage, run_dir=None, weights=False)
    built = time.monotonic()
    engine = build_engine(config, stage, parts)
    wrapped = time.monotonic()
    held = held_bytes(engine)
    after = resident_bytes()
    loader = StageLoader(
        config,
        stage,
        vocabulary=parts.vocabulary,
        geometry=parts.geometry,
        rank=0,
        world_size=ranks,
        start_step=1,
        folder=folder,
        num_nodes=ranks // 8,
    )
    opened = time.monotonic()
    balance = balance_of(loader.plan, ranks=ranks)
    loader.close()
    planned = next(
        found
        for found in estimate(
            only(config, stage),
            cluster=Cluster(CARDS["h200"], ranks),
            text_tokens=16,
        ).stages
        if found.name == stage
    )
    return {
        "ranks": ranks,
        "stage": stage,
        "batch": batch,
        "parts_seconds": built - begin,
        "engine_seconds": wrapped - built,
        "loader_seconds": opened - wrapped,
        "grown_bytes": after - before,
        "held": held,
        "planned": {
            **{name: planned.memory[name] for name in ("weights", "gradients")},
            "masters": planned.memory["optimizer"] / 3,  # two thirds are moments
        },
        **balance,
    }


def only(config: Any, stage: str) -> Any:
    """Return the recipe with one stage, whose batch divides over the ranks."""
    return config.model_copy(update={"stages": {stage: config.stages[stage]}})


def held_bytes(engine: Any) -> dict[str, int]:
    """Return what a rank's engine holds before its first step, by kind; moments come with it."""
    optimizer = engine.deepspeed.optimizer
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return {
        "weights": sum(p.ds_tensor.nbytes for p in engine.module.parameters()),
        "gradients": 0 if buffer is None else buffer.nbytes,
        "masters": sum(m.nbytes for m in optimizer.fp32_partitioned_groups_flat),
    }


def resident_bytes() -> int:
    """Return this process's resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def balance_of(plan: Any, *, ranks: int) -> dict[str, float]:
    """Say how even the ranks' work is, over the first steps; sizes are the plan's bounds."""
    import numpy as np

    (source,) = plan.sources
    uneven, packs, seconds, fill = [], [], [], []
    for step in range(1, STEPS_LOOKED_AT + 1):
        begin = time.monotonic()
        dealt = plan.step(step, ranks, num_nodes=ranks // 8).ranks
        seconds.append(time.monotonic() - begin)
        records = [[slot.record for pack in one for slot in pack] for one in dealt]
        tokens = np.array([int(source.tokens[one].sum()) for one in records])
        uneven.append(tokens.max() / tokens.mean())
        packs.append(len(dealt[0]))
        fill.append(tokens.sum() / (ranks * packs[-1] * plan.tokens_per_pack))
    return {
        "uneven": float(np.median(uneven)),
        "packs": float(np.median(packs)),
        "fill": float(np.median(fill)),
        "plan_seconds": float(np.median(seconds)),
    }


# --- tables ---------------------------------------------------------------------------------------


def report(counted: Mapping[str, Any], built: list[dict[str, Any]], where: str) -> str:
    """Write both tables."""
    lines = [
        "# Many ranks, on one CPU",
        "",
        f"`python tools/bench_scale.py --out benchmarks/scale_cpu`; {where}.",
        "",
        "## Bytes and collectives of a step",
        "",
        "Recipe debug, 8 records a rank, the third step, rank 0. Counted: whole tensors gathered "
        "and scattered in MB, in brackets as multiples of what `launcher plan` reckons with; sent: "
        "with ring algorithms, of all kinds. `fake`: torch's fake process group, nothing travels; "
        "where `real` stands beside it, both count the same.",
        "",
        "| step | ranks | packs a rank | gathered | reduced | sent | collectives |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for setting in SETTINGS:
        for name, found in counted.items():
            one = found[setting.name]
            cells = [
                f"{one[key] / 1e6:,.2f} ({ratio(one[key], one[f'planned_{key}'])})"
                for key in ("gathered", "reduced", "sent")
            ]
            lines.append(
                f"| {setting.name} | {name} | {one['packs']} | {' | '.join(cells)} "
                f"| {one['collectives']} |"
            )
    lines += [
        "",
        "## One rank of a 2B run",
        "",
        "Recipe cocoa_qwen2_vl_2b without adapters, all weights trained, bfloat16, engine ZeRO-3 "
        "with weights gathered when used, rank 0 under the fake process group; random memory for "
        "weights, the shipped pictures at 336 x 336 for data, 4 records a rank or more. MiB, in "
        "brackets as multiples of what `launcher plan` says; moments, twice the masters, come with "
        "the first step. The process's growth is the most of a build, freed memory that the "
        "allocator kept included. Unevenness: tokens of the fullest rank over the mean, median of "
        f"{STEPS_LOOKED_AT} steps.",
        "",
        "| ranks | stage | batch | weights | gradients | float32 masters | process grew by "
        "| parts s | engine s | loader s | plan a step ms | packs | unevenness | fill |",
        "| ---: | --- |" + " ---: |" * 12,
    ]
    for one in built:
        held, planned = one["held"], one["planned"]
        cells = [
            f"{held[kind] / MIB:,.1f} ({ratio(held[kind], planned[kind])})"
            for kind in ("weights", "gradients", "masters")
        ]
        lines.append(
            f"| {one['ranks']:,} | {one['stage']} | {one['batch']:,} | {' | '.join(cells)} "
            f"| {one['grown_bytes'] / MIB:,.0f} | {one['parts_seconds']:.0f} "
            f"| {one['engine_seconds']:.0f} | {one['loader_seconds']:.0f} "
            f"| {1e3 * one['plan_seconds']:.0f} | {one['packs']:.0f} | {one['uneven']:.2f} "
            f"| {100 * one['fill']:.0f} % |"
        )
    return "\n".join(lines)


def ratio(found: float, planned: float) -> str:
    """Return found over planned."""
    return (
        f"{found / planned:.2f} x" if planned else ("as planned" if not found else "none planned")
    )


if __name__ == "__main__":
    sys.exit(main())
