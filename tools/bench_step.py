"""What a step is made of: time by part, tokens a second, memory, bytes sent; or its counts.

    python tools/bench_step.py debug                          # every stage, as a table
    python tools/bench_step.py quickstart --stage contrastive --nproc 2 --out benchmarks/step_cpu
    python tools/bench_step.py debug --against ../before      # beside another checkout, by turns
    python tools/bench_step.py --device cuda                  # 2B, random weights, 8k and 16k packs
    python tools/bench_step.py --check                        # counts against the committed ones
    python tools/bench_step.py --update                       # write them anew, after a change

Parts are measured in steps of their own under a stopwatch that costs time itself; seconds a step
and tokens a second are of steps without it. CPU seconds are of all ranks; on a shared machine the
ratios are worth more than the numbers. `--device cuda` has never been run: no GPU was at hand.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(TOOLS))
if not os.environ.get("BENCH_CHECKOUT"):
    sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from ranks_of_a_bench import run_ranks  # noqa: E402
from step_cases import (  # noqa: E402
    CASES,
    GRAPHS,
    count_case,
    count_graphs,
    differences,
    installed,
    read_committed,
    write_committed,
)
from step_parts import PARTS, Stopwatch, watched  # noqa: E402

WARM_UP_STEPS = 3
MIB = 2**20
PICTURE = 448 * 448  # pixels: 256 visual tokens of 28 x 28
CUDA_TOKENS = (8192, 16384)
CUDA_OVERRIDES = (
    "model.random=null",
    "model.dtype=bfloat16",
    f"data.image={{min_pixels: {PICTURE}, max_pixels: {PICTURE}}}",
    "engine.ds_config=zero3",
)


def main() -> int:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="debug")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value")
    parser.add_argument("--check", action="store_true", help="compare counts; 1 if any differs")
    parser.add_argument("--update", action="store_true", help="count, and write the file")
    parser.add_argument("--stage", action="append", help="default: every stage of the recipe")
    parser.add_argument("--nproc", type=int, help="ranks; default 2, with --device cuda 1")
    parser.add_argument("--steps", type=int, default=8, help="counted steps, of either kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--against", type=Path, help="another checkout, measured by turns")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.worker:
        return worker(json.loads(arguments.worker))
    if arguments.check or arguments.update:
        return check(update=arguments.update)
    return measure(arguments)


# --- counts ---------------------------------------------------------------------------------------


def check(*, update: bool) -> int:
    """Count every case and compare it with the file, or write the file."""
    found: dict[str, dict[str, int]] = {}
    for ranks in sorted({case.ranks for case in CASES}):
        found |= run_ranks({"count": ranks}, ranks=ranks, script=__file__)[0]
    if update:
        write_committed(found)
        print(f"wrote {sum(map(len, found.values()))} counts")
        return 0
    versions, expected = read_committed()
    lines = differences(expected, found)
    if lines and versions != installed():
        print(f"the file is of {versions}, installed are {installed()}: counts may differ for that")
    for line in lines:
        print(f"FAIL {line}")
    if lines:
        print("if that is meant: python tools/bench_step.py --update, and say why in the commit")
        return 1
    print(f"PASS {sum(map(len, expected.values()))} counts of {len(expected)} cases are as before")
    return 0


def count_all(ranks: int, rank: int) -> dict[str, dict[str, int]]:
    """Count the cases of a number of ranks, in its processes."""
    found = {case.name: count_case(case, rank=rank) for case in CASES if case.ranks == ranks}
    if ranks == 1:
        found[GRAPHS] = count_graphs()
    return found


def worker(job: dict[str, Any]) -> int:
    """Be one rank of one job."""
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.train.session import quiet_known_warnings

    quiet_known_warnings()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = distributed.start(timeout_seconds=600)
    if "count" in job:
        found: Any = count_all(job["count"], world.rank)
    else:
        found = {}
        for case in job["cases"]:
            with tempfile.TemporaryDirectory() as folder:
                found[case["name"]] = time_stage({**job, **case}, world, Path(folder))
    Path(job["output"]).write_text(json.dumps(found))
    distributed.stop()
    return 0


# --- time by part ---------------------------------------------------------------------------------


def build_stage(job: Mapping[str, Any], world: Any, folder: Path) -> tuple[Any, Any, Any]:
    """Return the engine and the loader of a stage, and what its rows cost in FLOPs."""
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.data.loader import StageLoader
    from cocoa_dist.runtime import seed_everything
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.resources import StepFlops
    from cocoa_dist.train.session import build_engine

    is_cuda, stage = job["device"] == "cuda", job["stage"]
    overrides = [f"stages.{stage}.init_from={FROM_MODEL}", *job["overrides"]]
    if is_cuda:
        overrides.append(f"model.path={write_2b(folder / 'model')}")
    config = load_recipe(job["recipe"], overrides)
    seed_everything(config.seed)
    parts = build_parts(config, stage, run_dir=None, weights=not is_cuda)
    if is_cuda:
        draw_weights(parts.model)
    flops = StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )
    engine = build_engine(config, stage, parts)
    loader = StageLoader(
        config,
        stage,
        vocabulary=parts.vocabulary,
        geometry=parts.geometry,
        rank=world.rank,
        world_size=world.size,
        start_step=1,
        folder=folder,
    )
    return engine, loader, flops


def time_stage(job: Mapping[str, Any], world: Any, folder: Path) -> dict[str, Any]:
    """Train one stage: plain steps, steps under the stopwatch, and one whose bytes are counted."""
    import torch

    from cocoa_dist.train.resources import peak_flops
    from cocoa_dist.train.traffic import counted_traffic

    is_cuda, steps = job["device"] == "cuda", job["steps"]
    engine, loader, flops = build_stage(job, world, folder)
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    done = 0

    def step(watch: Stopwatch) -> Any:
        nonlocal done
        done += 1
        with watch.part("data wait"):
            batch = loader.next_step()
        engine.train_step(batch.packs, step=done)
        return batch

    idle = Stopwatch()
    for _ in range(WARM_UP_STEPS):
        step(idle)
    memory = PeakMemory(is_cuda=is_cuda)
    seconds, batches, cpu = [], [], time.process_time()
    for _ in range(steps):
        wait()
        begin = time.perf_counter()
        batches.append(step(idle))
        wait()
        seconds.append(time.perf_counter() - begin)
    cpu = (time.process_time() - cpu) / steps
    peak = memory.bytes()
    watch = Stopwatch(wait_for_device=wait)
    with watched(engine, watch):
        watch.reset()
        for _ in range(steps):
            step(watch)
        watch._charge()
    with counted_traffic() as traffic:
        step(idle)
    loader.close()
    engine.deepspeed.destroy()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "samples": sum(b.num_samples for b in batches) / steps,
        "tokens": sum(b.num_tokens for b in batches) / steps,
        "packs": sum(len(b.packs) for b in batches) / steps,
        "flops": sum(flops.of_packs(b.packs) for b in batches) / steps,
        "peak_flops": peak_flops(engine.device),
        "peak_bytes": peak,
        "sent_bytes": traffic.sent(world.size),
        "collectives": sum(traffic.calls.values()),
        "wall": {name: value / steps for name, value in watch.wall.items()},
        "cpu": {name: value / steps for name, value in watch.cpu.items()},
    }


class PeakMemory:
    """The most memory since it was made: torch's on a GPU, the process's on a CPU."""

    def __init__(self, *, is_cuda: bool) -> None:
        import torch

        self._torch = torch if is_cuda else None
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """Return it."""
        if self._torch is not None:
            return int(self._torch.cuda.max_memory_allocated())
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def write_2b(folder: Path) -> Path:
    """Write a folder of Qwen2-VL-2B's size with the shipped tokenizer; its weights are none."""
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig

    from cocoa_dist.config import ModelConfig, RandomModelConfig
    from cocoa_dist.inputs import tokenizer_folder
    from cocoa_dist.model.families import SPECIAL_TOKENS
    from cocoa_dist.train.build import special_token_ids
    from launcher.plan.shapes import PUBLISHED

    text, vision = PUBLISHED["Qwen2-VL-2B"].text, PUBLISHED["Qwen2-VL-2B"].vision
    shipped = ModelConfig(random=RandomModelConfig(), tokenizer="asset:tokenizer")
    ids = special_token_ids(shipped)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_folder(shipped) / "tokenizer.json", folder)
    save_file({}, folder / "model.safetensors")
    Qwen2VLConfig(
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "intermediate_size": text.inner_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision.layers,
            "embed_dim": vision.width,
            "hidden_size": text.width,
            "num_heads": vision.heads,
        },
        tie_word_embeddings=True,
        **{name: ids[token] for name, token in SPECIAL_TOKENS.items()},
    ).save_pretrained(folder)
    return folder


def draw_weights(model: Any) -> None:
    """Fill a model without weights: normal matrices, vectors of one where they scale."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(float("norm" in name or "ln_q" in name) * name.endswith("weight"))


def measure(arguments: argparse.Namespace) -> int:
    """Measure every stage and size, the checkouts by turns, and print the table."""
    from cocoa_dist.config import load_recipe

    ranks = arguments.nproc or (1 if arguments.device == "cuda" else 2)
    checkouts = {"after" if arguments.against else "": ROOT}
    if arguments.against:
        checkouts = {"before": arguments.against.resolve(), **checkouts}
    stages = arguments.stage or list(load_recipe(arguments.recipe, arguments.overrides).stages)
    cases = [
        {
            "name": ", ".join(part for part in (stage, size) if part),
            "stage": stage,
            "overrides": [*overrides, *arguments.overrides],
        }
        for stage in stages
        for size, overrides in sizes_of(arguments, stage)
    ]
    job = {
        "recipe": arguments.recipe,
        "device": arguments.device,
        "steps": arguments.steps,
        "cases": cases,
    }
    runs: dict[str, list[dict[str, Any]]] = {
        ", ".join(part for part in (case["name"], label) if part): []
        for case in cases
        for label in checkouts
    }
    for repeat in range(arguments.repeats):
        for label, checkout in checkouts.items():
            found = run_ranks(job, ranks=ranks, script=__file__, checkout=checkout)
            for case in cases:
                name = ", ".join(part for part in (case["name"], label) if part)
                runs[name].append(together([rank[case["name"]] for rank in found]))
                print(f"{repeat + 1}: {name} {runs[name][-1]['seconds']:.3f} s", flush=True)
    settings = {
        "recipe": " ".join([arguments.recipe, *arguments.overrides]),
        "device": arguments.device,
        "ranks": ranks,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "against": bool(arguments.against),
        "machine": machine(arguments.device),
    }
    text = report(runs, settings)
    print(text)
    if arguments.out:
        found = {"settings": settings, "runs": runs}
        arguments.out.with_suffix(".md").write_text(text + "\n")
        arguments.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def sizes_of(arguments: argparse.Namespace, stage: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the sizes a stage is measured at: the recipe's own, or two of packs at 2B."""
    if arguments.device != "cuda":
        return [("", ())]
    found = []
    for tokens in CUDA_TOKENS:
        batch = tokens // 256 * (8 if stage == "contrastive" else 1)
        found.append(
            (
                f"2B, {tokens // 1024}k tokens a pack",
                (
                    *CUDA_OVERRIDES,
                    f"data.tokens_per_pack={tokens}",
                    f"data.patches_per_pack={4 * tokens}",
                    f"stages.{stage}.batch_size={batch}",
                    f"stages.{stage}.steps=100",
                ),
            )
        )
    return found


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what the ranks of one run found."""
    slowest = [max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)]
    total = {key: sum(r[key] for r in ranks) for key in ("samples", "tokens", "flops")}
    seconds = statistics.median(slowest)
    peak = ranks[0]["peak_flops"]
    return {
        **total,
        "seconds": seconds,
        "slowest": max(slowest) / seconds,
        "packs": ranks[0]["packs"],
        "cpu_seconds": sum(rank["cpu_seconds"] for rank in ranks),
        "mfu": total["flops"] / (seconds * len(ranks) * peak) if peak else None,
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "sent_bytes": ranks[0]["sent_bytes"],
        "collectives": ranks[0]["collectives"],
        "wall": {name: statistics.fmean(r["wall"][name] for r in ranks) for name in PARTS},
        "cpu": {name: sum(r["cpu"][name] for r in ranks) for name in PARTS},
    }


def report(runs: Mapping[str, list[dict[str, Any]]], settings: Mapping[str, Any]) -> str:
    """Write the tables, medians over the repeats."""

    def median(name: str, *keys: str) -> float:
        values = []
        for run in runs[name]:
            value: Any = run
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.median(values)

    kind = "wall" if settings["device"] == "cuda" else "cpu"
    what = "wall ms of a rank" if kind == "wall" else "CPU ms of all ranks"
    lines = [
        f"# Where a step's time goes, {settings['device']}",
        "",
        f"`python tools/bench_step.py {settings['recipe']} --device {settings['device']} --nproc "
        f"{settings['ranks']} --steps {settings['steps']} --repeats {settings['repeats']}"
        f"{' --against OTHER_CHECKOUT' if settings['against'] else ''}`; {settings['machine']}. "
        "Medians over repeats; checkouts take turns. Wall times of a shared machine vary; CPU "
        "times, which are of all ranks, less. GFLOP: what the model needs, all ranks, as each "
        "checkout counts it. Slowest "
        "step: over the median, worst of a run, median over repeats. Peak: of the process, which "
        "does all stages one after the other.",
        "",
        "| step | tokens | packs a rank | wall ms | CPU ms | tokens / s | tokens / CPU s | GFLOP "
        "| MFU | slowest step | peak MiB | sent MiB a rank | collectives |",
        "| --- |" + " ---: |" * 12,
    ]
    for name in runs:
        seconds, cpu = median(name, "seconds"), median(name, "cpu_seconds")
        tokens, known = median(name, "tokens"), runs[name][0]["mfu"] is not None
        mfu = f"{100 * median(name, 'mfu'):.0f} %" if known else "-"
        lines.append(
            f"| {name} | {tokens:,.0f} | {median(name, 'packs'):.1f} | {1e3 * seconds:,.0f} "
            f"| {1e3 * cpu:,.0f} | {tokens / seconds:,.0f} | {tokens / cpu:,.0f} "
            f"| {median(name, 'flops') / 1e9:,.1f} | {mfu} "
            f"| {median(name, 'slowest'):.2f} x | {median(name, 'peak_bytes') / MIB:,.0f} "
            f"| {median(name, 'sent_bytes') / MIB:,.1f} | {median(name, 'collectives'):.0f} |"
        )
    lines += [
        "",
        f"By part, {what} in a step under the stopwatch, and share of it:",
        "",
        f"| step | {' | '.join(PARTS)} |",
        "| --- |" + " ---: |" * len(PARTS),
    ]
    for name in runs:
        times = [median(name, kind, part) for part in PARTS]
        cells = [f"{1e3 * t:,.1f} ({100 * t / sum(times):.0f} %)" for t in times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """Say what was measured on."""
    versions = ", ".join(f"{name} {number}" for name, number in installed().items())
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{os.cpu_count()} cores of {platform.machine()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
