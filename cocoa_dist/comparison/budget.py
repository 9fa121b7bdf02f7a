"""What a step of each stage costs, by a pilot, and how many steps a budget buys.

The stages before the last one share a part of the budget in their recipe's proportions, or keep
their recipe's steps; the contrastive stage gets what is left. CPU seconds are those of all ranks
inside steps, as manifests count them.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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


class Split(StrEnum):
    """What the stages before the contrastive one get."""

    REFERENCE = "reference"  # what the reference arm's own ones take, in every arm
    RECIPE = "recipe"  # the steps of the arm's recipe, whatever they take


@dataclass(frozen=True)
class StageCost:
    """What a pilot measured of one stage."""

    arm: str  # whose pilot it was
    stage: str
    steps: int  # of a pilot
    cpu_step: float  # CPU seconds of a step, mean without the first ones
    cpu_spread: float  # standard deviation of one step
    cpu_first: float  # CPU seconds that the first steps take beyond that, once
    tokens_step: float  # mean
    rounds: int = 1  # pilots that these are the means of
    cpu_low: float = 0.0  # the lowest and the highest of their cpu_step
    cpu_high: float = 0.0

    def with_round(self, other: "StageCost") -> "StageCost":
        """Return the mean of all rounds so far and another one."""

        def mean(own: float, new: float) -> float:
            return (own * self.rounds + new) / (self.rounds + 1)

        return replace(
            self,
            cpu_step=mean(self.cpu_step, other.cpu_step),
            cpu_spread=mean(self.cpu_spread, other.cpu_spread),
            cpu_first=mean(self.cpu_first, other.cpu_first),
            tokens_step=mean(self.tokens_step, other.tokens_step),
            rounds=self.rounds + 1,
            cpu_low=min(self.cpu_low, other.cpu_low),
            cpu_high=max(self.cpu_high, other.cpu_high),
        )

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


def unmeasured(config: RunConfig, costs: Costs, *, rounds: int = 1) -> list[str]:
    """Return the stages of a recipe that fewer than so many pilots have measured."""
    found = {name: costs.get(cost_key(config, name)) for name in config.stages}
    return [name for name, cost in found.items() if cost is None or cost.rounds < rounds]


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
        cpu_low=mean,
        cpu_high=mean,
    )


def stage_costs(config: RunConfig, costs: Costs) -> dict[str, StageCost]:
    """Return the cost of each stage. Raises ValueError if one has not been measured."""
    missing = unmeasured(config, costs)
    if missing:
        raise ValueError(f"{config.name}: no pilot has measured {', '.join(missing)}")
    return {name: costs[cost_key(config, name)] for name in config.stages}


def expected(
    config: RunConfig, costs: Costs, *, budget: Budget, stages: Sequence[str] | None = None
) -> float:
    """Return what a run, or some of its stages, will use in the budget's unit.

    For equal steps: of the contrastive stage, where it is of the whole run; else CPU seconds.
    """
    if budget is Budget.STEPS and stages is None:
        return float(config.stages[stage_of_pairs(config)].steps)
    found = stage_costs(config, costs)
    total = 0.0
    for name in config.stages if stages is None else stages:
        cost, steps = found[name], config.stages[name].steps
        total += cost.tokens(steps) if budget is Budget.TOKENS else cost.cpu_seconds(steps)
    return total


def fitted(
    variant: Variant, costs: Costs, *, budget: Budget, amount: float, before: float | None = None
) -> RunConfig:
    """Return the variant's recipe with the steps that use `amount` up.

    `before` is what its stages before the contrastive one get of it (for equal steps: on top of
    it, in CPU seconds); None: the steps they have. Raises ValueError if that leaves nothing.
    """
    tree: dict[str, Any] = variant.config.model_dump(mode="json")
    earlier, last = reconstruction_stages(variant.config), stage_of_pairs(variant.config)
    if before is not None and earlier:
        scale = _scale(variant.config, costs, budget=budget, before=before)
        for name in earlier:
            stage = tree["stages"][name]
            stage["steps"] = max(1, round(stage["steps"] * scale))
    config = with_warm_up_inside(tree)
    if budget is Budget.STEPS:
        steps = round(amount)
    else:
        used = expected(config, costs, budget=budget, stages=earlier)
        own, is_time = stage_costs(config, costs)[last], budget is Budget.COMPUTE
        first, each = (own.cpu_first, own.cpu_step) if is_time else (0.0, own.tokens_step)
        steps = round((amount - used - first) / each)
        if steps < 1:
            unit = "CPU seconds" if is_time else "tokens"
            raise ValueError(
                f"the stages before '{last}' take {used:.0f} of {amount:.0f} {unit} and leave no "
                "step of it; lower --reconstruction, or raise the budget"
            )
    tree["stages"][last]["steps"] = steps
    return with_warm_up_inside(tree)


def _scale(config: RunConfig, costs: Costs, *, budget: Budget, before: float) -> float:
    """Return by what the steps before the contrastive stage are multiplied to use `before`."""
    found, once, each = stage_costs(config, costs), 0.0, 0.0
    for name in reconstruction_stages(config):
        cost, steps = found[name], config.stages[name].steps
        if budget is Budget.TOKENS:
            each += cost.tokens(steps)
        else:
            once, each = once + cost.cpu_first, each + cost.cpu_step * steps
    return max(0.0, before - once) / each
