"""Puts the costs of all stages together, says whether they fit and what to change if not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cocoa_dist.config import RunConfig
from launcher.plan.costs import StageCost, Workload, stage_cost
from launcher.plan.hardware import GIB, Cluster
from launcher.plan.shapes import ModelShape, model_shape

_USABLE = 0.94  # of a card's memory; the rest is the driver's and what is not counted here


@dataclass(frozen=True)
class Estimate:
    """What a recipe costs on a cluster."""

    recipe: str
    shape: ModelShape
    cluster: Cluster
    workload: Workload
    resident: bool  # every card keeps all weights gathered
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The whole run, without waiting and restarts."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Cards times hours."""
        return self.seconds * self.cluster.gpus / 3600

    @property
    def usable_bytes(self) -> float:
        """Memory of a card that the run can have."""
        return _USABLE * self.cluster.card.memory

    @property
    def misfits(self) -> tuple[StageCost, ...]:
        """Stages that do not fit into a card."""
        return tuple(stage for stage in self.stages if stage.memory_bytes > self.usable_bytes)

    @property
    def save_seconds(self) -> float:
        """Writing the largest checkpoint, every node its part at once."""
        largest = max(stage.checkpoint_bytes for stage in self.stages)
        return largest / (self.cluster.disk_bytes * self.cluster.nodes)

    @property
    def interval_seconds(self) -> float:
        """Time between checkpoints that loses least (Young 1974; Daly 2006, first order).

        sqrt(2 x save time x time between failures), of a save that holds the step up.
        """
        return math.sqrt(2 * self.save_seconds * self.cluster.failure_seconds)

    def interval_steps(self, stage: StageCost) -> int:
        """Return the same in steps of a stage."""
        return max(1, round(self.interval_seconds / stage.step_seconds))


def estimate(
    config: RunConfig, *, cluster: Cluster, text_tokens: int, image_tokens: int | None = None
) -> Estimate:
    """Estimate a recipe. `image_tokens` defaults to a picture of `data.image.max_pixels`.

    Raises ValueError if a stage's batch does not divide over the cards, or the model is not known.
    """
    shape = model_shape(config.model)
    for name, stage in config.stages.items():
        if stage.batch_size % cluster.gpus:
            raise ValueError(
                f"stages.{name}.batch_size={stage.batch_size} does not divide over {cluster.gpus} "
                f"cards; {_nearby(stage.batch_size, cluster.gpus)}"
            )
    pixels = (shape.vision.patch_size * shape.vision.merge) ** 2
    seen = config.data.image.max_pixels // pixels if image_tokens is None else image_tokens
    workload = Workload(text_tokens=text_tokens, image_tokens=max(1, seen))

    def stages(*, resident: bool) -> tuple[StageCost, ...]:
        return tuple(
            stage_cost(
                config,
                name,
                shape=shape,
                cluster=cluster,
                workload=workload,
                resident=resident,
            )
            for name in config.stages
        )

    kept = stages(resident=True)
    fits = all(s.memory_bytes <= _USABLE * cluster.card.memory for s in kept)
    wanted = config.engine.resident_parameters
    resident = fits if wanted == "auto" else bool(wanted)
    return Estimate(
        recipe=config.name,
        shape=shape,
        cluster=cluster,
        workload=workload,
        resident=resident,
        stages=kept if resident else stages(resident=False),
        assumptions=_assumptions(cluster, workload, given=image_tokens is not None),
    )


def advice(config: RunConfig, found: Estimate) -> list[str]:
    """Say what would make stages fit, the cheapest change first, each tried."""
    if not found.misfits:
        return []
    names = ", ".join(stage.name for stage in found.misfits)
    lines = [
        f"{names}: {found.misfits[0].memory_bytes / GIB:.0f} GiB of the "
        f"{found.usable_bytes / GIB:.0f} GiB that a {found.cluster.card.name} has"
    ]
    for change, changed, cluster in _changes(config, found):
        tried = estimate(
            changed,
            cluster=cluster,
            text_tokens=found.workload.text_tokens,
            image_tokens=found.workload.image_tokens,
        )
        need = max(stage.memory_bytes for stage in tried.stages) / GIB
        lines.append(f"{change}: {need:.0f} GiB, {'does not fit' if tried.misfits else 'fits'}")
        if not tried.misfits:
            break
    return lines


def calibrated(cluster: Cluster, found: Estimate, seconds: float) -> Cluster:
    """Return the cluster with the share of peak that a run's first stage was seen to reach.

    `seconds`: median of its steps. Traffic is taken as estimated. Raises ValueError if the step is
    shorter than its traffic alone.
    """
    stage = found.stages[0]
    compute = seconds - stage.network_seconds
    if compute <= 0:
        raise ValueError(
            f"the run's step takes {seconds:.3g} s, its traffic alone is estimated at "
            f"{stage.network_seconds:.3g} s: give the network of that run with --interconnect"
        )
    peak = cluster.gpus * cluster.card.peak_flops
    return replace(cluster, compute_share=stage.hardware_flops / (compute * peak))


def _changes(config: RunConfig, found: Estimate) -> Sequence[tuple[str, RunConfig, Cluster]]:
    """Return the changes to try, each on top of those before it."""
    tried: list[tuple[str, RunConfig, Cluster]] = []
    cluster, model, data = found.cluster, config.model, config.data
    if not model.checkpoint_activations:
        model = model.model_copy(update={"checkpoint_activations": True})
        config = config.model_copy(update={"model": model})
        tried.append(("model.checkpoint_activations=true", config, cluster))
    while data.tokens_per_pack > 2048:
        halved = {
            "tokens_per_pack": data.tokens_per_pack // 2,
            "patches_per_pack": data.patches_per_pack // 2,
        }
        data = data.model_copy(update=halved)
        config = config.model_copy(update={"data": data})
        change = " ".join(f"data.{key}={value}" for key, value in halved.items())
        tried.append((change, config, cluster))
    batch = math.gcd(*(stage.batch_size for stage in config.stages.values()))
    for factor in (2, 4, 8):
        if batch % (cluster.gpus * factor) == 0:
            more = replace(cluster, gpus=cluster.gpus * factor)
            tried.append((f"--gpus {more.gpus}", config, more))
    return tried


def _assumptions(cluster: Cluster, workload: Workload, *, given: bool) -> tuple[str, ...]:
    origin = "given" if given else "a picture of data.image.max_pixels"
    peak = cluster.card.peak_flops / 1e12
    return (
        f"{workload.text_tokens} tokens a text, {workload.image_tokens} a picture ({origin})",
        f"kernels reach {cluster.compute_share:.0%} of {peak:.0f} TFLOP/s",
        f"collectives reach {cluster.bus_bytes / 1e9:.0f} GB/s through each card, nothing overlaps",
        f"a failure every {cluster.failure_seconds / 3600:.0f} h, a save of "
        f"{cluster.disk_bytes / 1e9:.0f} GB/s a node",
    )


def _nearby(batch: int, gpus: int) -> str:
    below = next(n for n in range(min(gpus, batch), 0, -1) if batch % n == 0)
    above = -(-batch // gpus) * gpus
    return f"take {below} cards, or a batch of {above}"


def median_step_seconds(run_dir: Path, *, stage: str) -> float:
    """Return the median wall seconds of a run's steps in one stage, the first five left out.

    Raises ValueError if it has logged fewer than ten.
    """
    from statistics import median

    from launcher.steplog import newest_first

    seconds = [
        record.step_seconds
        for record in newest_first(run_dir)
        if record.stage == stage and record.step > 5 and record.step_seconds > 0
    ]
    if len(seconds) < 5:
        raise ValueError(
            f"{run_dir} has logged {len(seconds)} steps of {stage} behind the fifth: at least 5 "
            "are needed to calibrate with"
        )
    return median(seconds)
