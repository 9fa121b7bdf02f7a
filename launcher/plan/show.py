"""Shows an estimate as tables, or as one JSON object."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.plan.costs import StageCost
from launcher.plan.estimate import Estimate
from launcher.plan.hardware import GIB
from launcher.progress import duration


def as_json(found: Estimate) -> dict[str, Any]:
    """Return the estimate for scripts: bytes, seconds, FLOPs."""
    return {
        "recipe": found.recipe,
        "model": found.shape.name,
        "parameters": found.shape.parameters,
        "gpu": found.cluster.card.name,
        "gpus": found.cluster.gpus,
        "resident_parameters": found.resident,
        "fits": not found.misfits,
        "seconds": found.seconds,
        "gpu_hours": found.gpu_hours,
        "checkpoint_interval_seconds": found.interval_seconds,
        "stages": [
            {
                **asdict(stage),
                "memory": dict(stage.memory),
                "memory_bytes": stage.memory_bytes,
                "step_seconds": stage.step_seconds,
                "checkpoint_interval_steps": found.interval_steps(stage),
            }
            for stage in found.stages
        ],
        "assumptions": list(found.assumptions),
    }


def show_estimate(console: Console, found: Estimate, advice: list[str]) -> None:
    """Print what a recipe costs, what is assumed, and what to change if it does not fit."""
    cluster = found.cluster
    console.print(
        f"{found.recipe} on {cluster.gpus} x {cluster.card.name}: {found.shape.name}, "
        f"{found.shape.parameters / 1e9:.2f} B parameters, weights "
        f"{'on every card' if found.resident else 'partitioned'}"
    )
    console.print(_costs(found))
    console.print(_memory(found))
    console.print(
        f"in all {duration(found.seconds)}, {found.gpu_hours:,.0f} GPU hours; a checkpoint about "
        f"every {duration(found.interval_seconds)} loses least"
    )
    for line in found.assumptions:
        console.print(f"assumed: {line}", style="dim")
    for line in advice:
        console.print(f"does not fit: {line}" if line is advice[0] else f"  with {line}")


def _costs(found: Estimate) -> Table:
    gpus = found.cluster.gpus
    rows: list[tuple[str, Callable[[StageCost], str]]] = [
        ("steps", lambda s: f"{s.steps:,}"),
        ("tokens a step", lambda s: f"{s.tokens_per_step:,}"),
        ("packs of a card a step", lambda s: f"{s.packs_per_step}"),
        ("trained parameters", lambda s: _count(s.trainable)),
        ("PFLOP a step", lambda s: f"{s.model_flops / 1e15:.3g}"),
        ("computing, a step", lambda s: _seconds(s.compute_seconds)),
        ("traffic, a step", lambda s: _seconds(s.network_seconds)),
        ("the stage", lambda s: duration(s.seconds)),
        ("GPU hours", lambda s: f"{s.seconds * gpus / 3600:,.1f}"),
        ("a checkpoint", lambda s: _size(s.checkpoint_bytes)),
        ("one about every", lambda s: f"{found.interval_steps(s):,} steps"),
    ]
    return _table("cost", found, rows)


def _memory(found: Estimate) -> Table:
    rows: list[tuple[str, Callable[[StageCost], str]]] = [
        (part, lambda s, part=part: f"{s.memory[part] / GIB:.1f}")  # type: ignore[misc]
        for part in found.stages[0].memory
    ]
    of = f"in all, of {found.usable_bytes / GIB:.0f}"
    return _table("GiB of a card", found, [*rows, (of, lambda s: f"{s.memory_bytes / GIB:.1f}")])


def _table(
    title: str, found: Estimate, rows: list[tuple[str, Callable[[StageCost], str]]]
) -> Table:
    table = Table(title, *(stage.name.replace("_", " ") for stage in found.stages))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, tell in rows:
        table.add_row(name, *map(tell, found.stages))
    return table


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
