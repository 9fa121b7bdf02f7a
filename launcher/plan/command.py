"""The command `plan`: its options, and what it does with them."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from cocoa_dist.config import load_recipe, load_resolved
from launcher.plan.estimate import advice, calibrated, estimate, median_step_seconds
from launcher.plan.hardware import CARDS, GIB, Card, Cluster
from launcher.plan.show import as_json, show_estimate

DESCRIPTION = """\
Say what a recipe needs before a GPU is asked for: parameters, memory of a card by part, FLOPs,
time and GPU hours of every stage, the size of a checkpoint and how often one pays.
What is assumed is printed below the numbers; --from-run replaces the largest assumption, the share
of its peak that a card reaches, by what a run of yours has shown.
"""
EXAMPLES = """\
examples:
  python -m launcher plan cocoa_qwen2_vl_2b --gpus 8 --gpu h200
  python -m launcher plan cocoa_qwen2_5_vl_7b --gpus 64 --interconnect 200 --text-tokens 300
  python -m launcher plan my.yaml data.tokens_per_pack=16384 --gpus 8 --from-run runs/first --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `plan`."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or path of a .yaml")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="values in place of the recipe's"
    )
    parser.add_argument("--gpus", type=_positive, required=True, metavar="N", help="cards in all")
    parser.add_argument(
        "--gpu",
        choices=sorted(CARDS),
        default="h200",
        help="kind of card (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of a card, where it differs"
    )
    parser.add_argument(
        "--gpus-per-node", type=_positive, default=8, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--interconnect",
        type=float,
        default=400.0,
        metavar="GBIT",
        help="network of a card between nodes, Gbit a second (default: %(default)s)",
    )
    parser.add_argument(
        "--text-tokens",
        type=_positive,
        default=128,
        metavar="N",
        help="tokens of an average text (default: %(default)s)",
    )
    parser.add_argument(
        "--image-tokens",
        type=_positive,
        metavar="N",
        help="visual tokens of an average picture (default: of one of data.image.max_pixels)",
    )
    parser.add_argument(
        "--from-run",
        type=Path,
        metavar="DIR",
        help="take the speed from the steps this run has logged, on --run-gpus of the same cards",
    )
    parser.add_argument(
        "--run-gpus", type=_positive, metavar="N", help="cards of --from-run (default: --gpus)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def plan(options: argparse.Namespace) -> int:
    """Print the estimate; returns 0, or 1 if it does not fit. Raises ValueError for bad input."""
    config = load_recipe(options.recipe, options.overrides)
    workload = {"text_tokens": options.text_tokens, "image_tokens": options.image_tokens}
    cluster = _cluster(options)
    if options.from_run is not None:
        ran = load_resolved(options.from_run / "resolved.yaml")
        as_it_ran = replace(cluster, gpus=options.run_gpus or options.gpus)
        stage = next(iter(ran.stages))
        seconds = median_step_seconds(options.from_run, stage=stage)
        seen = calibrated(as_it_ran, estimate(ran, cluster=as_it_ran, **workload), seconds)
        cluster = replace(cluster, compute_share=seen.compute_share)
    found = estimate(config, cluster=cluster, **workload)
    changes = advice(config, found)
    if options.json:
        sys.stdout.write(json.dumps({**as_json(found), "advice": changes}) + "\n")
    else:
        from rich.console import Console

        console = Console()
        show_estimate(console, found, changes)
    return 1 if found.misfits else 0


def _cluster(options: argparse.Namespace) -> Cluster:
    card: Card = CARDS[options.gpu]
    if options.gpu_memory is not None:
        card = replace(card, memory=options.gpu_memory * GIB)
    return Cluster(
        card,
        options.gpus,
        gpus_per_node=options.gpus_per_node,
        network_gbit=options.interconnect,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {number}")
    return number
