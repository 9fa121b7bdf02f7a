"""The small steps whose counts are committed, and how they are counted and compared.

Used by tools/bench_step.py and by the test that holds every change to benchmarks/step_counts.json.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).resolve().parent.parent / "benchmarks" / "step_counts.json"
LIBRARIES = ("torch", "deepspeed", "transformers")
WARM_UP_STEPS = 2  # DeepSpeed learns the order of its gathers in one, and checks it in the next
GRAPHS = "graphs of compiled layers"

Counts = dict[str, dict[str, int]]  # case -> name -> count


@dataclass(frozen=True)
class Case:
    """One stage of a recipe on a number of ranks."""

    recipe: str
    stage: str
    ranks: int
    variant: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the file calls it."""
        variant = f", {self.variant}" if self.variant else ""
        return f"{self.recipe}, {self.stage}{variant}, ranks: {self.ranks}"


_CHUNKS = (
    "data.tokens_per_pack=192",
    "stages.contrastive.objective.grad_cache.mode=always",
    "engine.reduction=coalesce",
    "engine.resident_parameters=true",
)
CASES = tuple(
    Case("debug", stage, ranks, variant, overrides)
    for ranks in (1, 2)
    for stage, variant, overrides in (
        ("joint_reconstruction", "", ()),
        ("eos_bridged_reconstruction", "", ()),
        ("contrastive", "", ()),
        ("contrastive", "in chunks", _CHUNKS),
    )
)


def count_case(case: Case, *, rank: int) -> dict[str, int]:
    """Count one step of a case. Collective: call on all its ranks, in one process group."""
    from cocoa_dist.train.build import first_steps
    from cocoa_dist.train.session import build_engine
    from cocoa_dist.train.step_counts import count_step

    config, parts, flops = _parts(case.recipe, case.stage, case.overrides)
    batches = first_steps(
        config, case.stage, parts, count=WARM_UP_STEPS + 1, rank=rank, world_size=case.ranks
    )
    engine = build_engine(config, case.stage, parts)
    for step in range(1, WARM_UP_STEPS + 1):
        engine.train_step(batches[step - 1].packs, step=step)
    last = WARM_UP_STEPS + 1
    found = count_step(engine, batches[last - 1].packs, step=last, flops=flops)
    engine.deepspeed.destroy()
    return found


def count_graphs() -> dict[str, int]:
    """Count what torch.compile makes of debug's layers, over packs of three lengths."""
    from torch import _dynamo as dynamo

    from cocoa_dist.model.compiled import compile_layers
    from cocoa_dist.train.build import first_steps

    config, parts, _ = _parts("debug", "joint_reconstruction", ())
    packs = [b.packs[0] for b in first_steps(config, "joint_reconstruction", parts, count=3)]
    dynamo.reset()
    dynamo.utils.counters.clear()
    compile_layers(parts.model.backbone, backend="eager")
    for pack in packs:
        output = parts.model.train()(pack)
        (output.logits_SV.sum() + output.patches_RC.sum()).backward()
    counters = dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def _parts(recipe: str, stage: str, overrides: Sequence[str]) -> tuple[Any, Any, Any]:
    from cocoa_dist.config import FROM_MODEL, load_recipe
    from cocoa_dist.runtime import seed_everything
    from cocoa_dist.train.build import build_parts
    from cocoa_dist.train.resources import StepFlops

    config = load_recipe(recipe, [f"stages.{stage}.init_from={FROM_MODEL}", *overrides])
    seed_everything(config.seed)
    parts = build_parts(config, stage, run_dir=None)
    flops = StepFlops.of_model(
        parts.model,
        text_logits=parts.objective.heads.text_logits,
        patches_a_token=parts.geometry.merge**2,
    )
    return config, parts, flops


def read_committed(path: Path = COMMITTED) -> tuple[dict[str, str], Counts]:
    """Return the versions and the counts of the file."""
    content = json.loads(path.read_text())
    return content["versions"], content["counts"]


def write_committed(found: Mapping[str, Mapping[str, int]], path: Path = COMMITTED) -> None:
    """Write counts, and the versions they are of."""
    content = {"versions": installed(), "counts": found}
    path.write_text(json.dumps(content, indent=1) + "\n")


def installed() -> dict[str, str]:
    """Return the versions that decide the counts."""
    return {name: version(name) for name in LIBRARIES}


def differences(
    expected: Mapping[str, Mapping[str, int]], found: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """Name every count that is not the expected one, with both and by how much; [] if none."""
    lines = []
    for case in sorted(expected.keys() | found.keys()):
        wanted, seen = expected.get(case), found.get(case)
        if wanted is None or seen is None:
            lines.append(f"{case}: {'not in the file' if wanted is None else 'not counted'}")
            continue
        for name in sorted(wanted.keys() | seen.keys()):
            before, now = wanted.get(name, 0), seen.get(name, 0)
            if before != now:
                change = f" ({100 * (now / before - 1):+.2g} %)" if before else ""
                lines.append(f"{case}: {name} is {now:,}{change}, expected {before:,}")
    return lines
