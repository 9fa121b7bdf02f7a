"""What a step of each stage costs, by a pilot, and how many steps a budget buys.

The steps before the last stage are the recipe's (times a factor); the contrastive stage gets what
is left. CPU seconds are those of all ranks inside steps, as manifests count them.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cocoa_dist.comparison.arms import (
    Variant,
    reconstruction_stages,
    stage_of_pairs,
    with_warm_up_inside,
)
from cocoa_dist.config import FROM_MODEL, RunConfig
from cocoa_dist.metrics import METRICS_NAME, read_json_lines

WARM_STEPS = 3  # of a stage, not typical: caches fill
_NOT_WORK = ("steps", "init_from", "optimizer")  # of a stage: no matter to what a step costs


class Budget(StrEnum):
    """What all arms have alike."""

    COMPUTE = "equal-compute"  # CPU seconds over all stages
    TOKENS = "equal-tokens"  # tokens over all stages
    STEPS = "equal-steps"  # contrastive steps; reconstruction comes on top


@dataclass(frozen=True)
class StageCost:
    """What a pilot measured of one stage."""

    arm: str  # whose pilot it was
    stage: str
    steps: int  # of the pilot
    cpu_step: float  # CPU seconds of a step, mean without the first ones
    cpu_spread: float  # standard deviation of one step
    cpu_first: float  # CPU seconds that the first steps take beyond that, once
    tokens_step: float  # mean

    def cpu_seconds(self, steps: int) -> float:
        """Return what so many steps are expected to take."""
        return self.cpu_first + self.cpu_step * steps

    def tokens(self, steps: int) -> float:
        """Return the tokens that so many steps are expected to see."""
        return self.tokens_step * steps


Costs = Mapping[str, StageCost]  # by cost_key


def cost_key(config: RunConfig, stage: str) -> str:
    """Return a hash of all that decides what a step of a stage costs."""
    tree = config.model_dump(mode="json")
    work = {k: v for k, v in tree["stages"][stage].items() if k not in _NOT_WORK}
    whole = [work, tree["model"], tree["data"], tree["engine"], tree["runtime"]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def unmeasured(config: RunConfig, costs: Costs) -> list[str]:
    """Return the stages of a recipe that no pilot has measured."""
    return [name for name in config.stages if cost_key(config, name) not in costs]


def pilot_config(config: RunConfig, stages: Sequence[str], *, steps: int) -> RunConfig:
    """Return a recipe that trains each stage for a few steps from the base model."""
    tree = config.model_dump(mode="json")
    tree["name"] = f"pilot-{config.name}"
    tree["stages"] = {name: tree["stages"][name] for name in stages}
    for stage in tree["stages"].values():
        stage |= {"steps": steps, "init_from": FROM_MODEL}
    tree["evaluation"]["every_steps"] = 0
    tree["checkpoint"]["every_steps"] = steps
    return with_warm_up_inside(tree)


def measure(run_dir: Path, *, arm: str, stage: str) -> StageCost:
    """Read what a stage cost from a run's `metrics.jsonl`.

    Raises ValueError if too few of its steps were timed.
    """
    lines = [line for line in read_json_lines(run_dir / METRICS_NAME) if line["stage"] == stage]
    spent = [float(line["cpu_seconds"]) for line in lines[1:]]  # a line has the step before's
    typical = spent[WARM_STEPS:]
    if len(typical) < 2:
        raise ValueError(
            f"{run_dir}: {len(spent)} steps of stage '{stage}' were timed, expected at least "
            f"{WARM_STEPS + 2}; raise pilot_steps of the preset"
        )
    mean = statistics.fmean(typical)
    return StageCost(
        arm=arm,
        stage=stage,
        steps=len(lines),
        cpu_step=mean,
        cpu_spread=statistics.stdev(typical),
        cpu_first=max(0.0, sum(spent[:WARM_STEPS]) - WARM_STEPS * mean),
        tokens_step=statistics.fmean(float(line["tokens"]) for line in lines),
    )


def stage_costs(config: RunConfig, costs: Costs) -> dict[str, StageCost]:
    """Return the cost of each stage. Raises ValueError if one has not been measured."""
    missing = unmeasured(config, costs)
    if missing:
        raise ValueError(f"{config.name}: no pilot has measured {', '.join(missing)}")
    return {name: costs[cost_key(config, name)] for name in config.stages}


def expected(config: RunConfig, costs: Costs, *, budget: Budget) -> float:
    """Return what a run is expected to use, in the budget's unit (steps: of the last stage)."""
    if budget is Budget.STEPS:
        return float(config.stages[stage_of_pairs(config)].steps)
    found = stage_costs(config, costs)
    return sum(
        cost.cpu_seconds(config.stages[name].steps)
        if budget is Budget.COMPUTE
        else cost.tokens(config.stages[name].steps)
        for name, cost in found.items()
    )


def fitted(variant: Variant, costs: Costs, *, budget: Budget, amount: float) -> RunConfig:
    """Return the variant's recipe with the contrastive steps that use `amount` up.

    Raises ValueError if its other stages leave nothing.
    """
    config, last = variant.config, stage_of_pairs(variant.config)
    if budget is Budget.STEPS:
        steps = round(amount)
    else:
        found = stage_costs(config, costs)
        before = sum(
            found[name].cpu_seconds(config.stages[name].steps)
            if budget is Budget.COMPUTE
            else found[name].tokens(config.stages[name].steps)
            for name in reconstruction_stages(config)
        )
        own = found[last]
        is_time = budget is Budget.COMPUTE
        first, each = (own.cpu_first, own.cpu_step) if is_time else (0.0, own.tokens_step)
        steps = round((amount - before - first) / each)
        if steps < 1:
            unit = "CPU seconds" if is_time else "tokens"
            raise ValueError(
                f"{variant.name}: the stages before '{last}' take {before:.0f} of {amount:.0f} "
                f"{unit} and leave no step of it; lower --reconstruction, or raise the budget"
            )
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["stages"][last]["steps"] = steps
    return with_warm_up_inside(tree)
