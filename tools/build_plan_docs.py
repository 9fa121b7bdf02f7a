"""Write docs/plan.md: what the real-size recipes need on 1, 8, 64 and 1,024 cards.

    python tools/build_plan_docs.py [--check]

The numbers are those of `python -m launcher plan`. With --check nothing is written: the exit code
says whether the file is up to date.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.config import load_recipe  # noqa: E402
from launcher.plan.estimate import Estimate, estimate  # noqa: E402
from launcher.plan.hardware import CARDS, GIB, Cluster  # noqa: E402

RECIPES = (
    *("cocoa_qwen2_vl_2b", "cocoa_qwen2_5_vl_3b", "cocoa_qwen2_5_vl_7b"),
    *("moca_qwen2_5_vl_3b", "moca_qwen2_5_vl_7b", "coma_qwen2_5_vl_3b", "coma_qwen2_5_vl_7b"),
    *("contrastive_qwen2_vl_2b", "contrastive_qwen2_5_vl_3b", "contrastive_qwen2_5_vl_7b"),
)
NUMBERS = (1, 8, 64, 1024)
CARD = "h200"
TEXT_TOKENS = 128
PAGE = ROOT / "docs" / "plan.md"
HEAD = f"""\
# What the recipes need

Estimates, not measurements: `python -m launcher plan RECIPE --gpus N --gpu {CARD}` prints them
with all parts of the memory, and `--from-run DIR` replaces the assumed speed by what a run of
yours has reached. Parameter counts are exact, activations within 15 % of what autograd keeps in
one layer (both tested). Times, traffic and the time between failures rest on what is listed under
the tables; no run at these sizes has been made.

A batch has to divide over the cards: on more cards than a stage's batch has records, the table
takes a batch of one record a card and as many steps less (marked *). That is another recipe; it is
here for its cost alone.
"""
COLUMNS = (
    "cards",
    "GiB a card",
    "weights",
    "seconds a step, by stage",
    "time",
    "GPU hours",
    "save every",
)
TAIL = """\
A failure every 50,000 card hours is what Llama 3 saw (arXiv 2407.21783, table 5: 419 unexpected
interruptions in 54 days on 16,384 cards). The interval between saves is Young's and Daly's square
root, for a save that holds the step up for as long as it takes to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    text = "\n".join(page()) + "\n"
    if not parser.parse_args(argv).check:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    sys.stderr.write(f"{PAGE} is out of date: run python tools/build_plan_docs.py\n")
    return 1


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield HEAD
    found: dict[int, Estimate] = {}
    for recipe in RECIPES:
        yield f"## {recipe}\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "| ---: | ---: | --- | --- | ---: | ---: | ---: |"
        for gpus in NUMBERS:
            found[gpus], stretched = _estimate(recipe, gpus)
            yield _row(found[gpus], mark="*" if stretched else "")
        yield f"\nAssumed: {found[NUMBERS[0]].assumptions[0]}.\n"
    yield "## Assumed\n"
    for gpus in NUMBERS:
        yield f"- {gpus:,} cards: {'; '.join(found[gpus].assumptions[1:])}"
    yield ""
    yield TAIL


def _estimate(recipe: str, gpus: int) -> tuple[Estimate, bool]:
    """Estimate a recipe; where a batch is too small for the cards, with a record a card."""
    config = load_recipe(recipe)
    overrides = []
    for name, stage in config.stages.items():
        if stage.batch_size < gpus:
            steps = max(1, round(stage.steps * stage.batch_size / gpus))
            overrides += [f"stages.{name}.batch_size={gpus}", f"stages.{name}.steps={steps}"]
    cluster = Cluster(CARDS[CARD], gpus)
    found = estimate(load_recipe(recipe, overrides), cluster=cluster, text_tokens=TEXT_TOKENS)
    return found, bool(overrides)


def _row(found: Estimate, *, mark: str) -> str:
    memory = max(stage.memory_bytes for stage in found.stages) / GIB
    steps = ", ".join(f"{stage.step_seconds:.2f}" for stage in found.stages)
    hours = found.seconds / 3600
    every = found.interval_seconds / 60
    weights = "on every card" if found.resident else "partitioned"
    return (
        f"| {found.cluster.gpus:,}{mark} | {memory:.0f} | {weights} | {steps} | {hours:.1f} h "
        f"| {found.gpu_hours:,.0f} | {every:.0f} min |"
    )


if __name__ == "__main__":
    sys.exit(main())
