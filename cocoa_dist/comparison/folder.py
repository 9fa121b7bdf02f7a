"""The folder of a comparison: what it was asked for, pilots, recipes, runs, scores, and its lock.

    plan.json      settings that all runs share, and what the pilots measured
    recipes/       one resolved recipe for each row; the seed is given on the command line
    runs/NAME/seedS, logs/, pilots/, scores/

A second call with other settings, or with an arm that is another than before, is refused by name.
"""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cocoa_dist.comparison.budget import StageCost
from cocoa_dist.config import RunConfig, differences, dump_yaml, load_resolved
from cocoa_dist.manifest import write_atomic

PLAN_NAME = "plan.json"
SCHEMA_VERSION = 1
_STEPS = re.compile(r"stages\.[^.]+\.(steps|optimizer\.warmup_steps):")


@dataclass(frozen=True)
class Place:
    """Paths inside the folder of a comparison."""

    root: Path

    def recipe(self, name: str) -> Path:
        """Return where the recipe of a row lies."""
        return self.root / "recipes" / f"{name}.yaml"

    def run(self, name: str, seed: int) -> Path:
        """Return the run folder of a row with a seed."""
        return self.root / "runs" / name / f"seed{seed}"

    def log(self, name: str, seed: int) -> Path:
        """Return where the launcher's words go."""
        return self.root / "logs" / f"{name}-seed{seed}.log"

    def score(self, name: str, seed: int) -> Path:
        """Return where the scores of a run are kept."""
        return self.root / "scores" / f"{name}-seed{seed}.json"

    def failure(self, name: str, seed: int) -> Path:
        """Return where it is said why a run has failed."""
        return self.root / "logs" / f"{name}-seed{seed}.failed"


@dataclass(frozen=True)
class Size:
    """The budget of a group, in the budget's unit."""

    amount: float
    before: float | None  # of the stages before the contrastive one; None: their recipe's steps


@dataclass
class Kept:
    """What is settled by a first call and holds for all later ones."""

    costs: dict[str, StageCost]  # of pilots, by cost_key
    sizes: dict[float, Size]  # the budget of each factor


def read_plan(place: Place, settings: dict[str, Any]) -> Kept:
    """Return what earlier calls with the same settings have settled; nothing for a new folder.

    Raises ValueError naming the settings that differ.
    """
    path = place.root / PLAN_NAME
    if not path.is_file():
        return Kept({}, {})
    try:
        content = json.loads(path.read_bytes())
        version, before, pilots = (content[k] for k in ("schema_version", "settings", "pilots"))
        sizes = {float(factor): Size(**found) for factor, found in content["sizes"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give another --out") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version {version}, expected {SCHEMA_VERSION}")
    changed = [
        f"  {key}: {before.get(key)!r} -> {settings.get(key)!r}"
        for key in {**before, **settings}
        if before.get(key) != settings.get(key)
    ]
    if changed:
        listed = "\n".join(changed)
        raise ValueError(
            f"{place.root} holds a comparison with other settings, and its runs would not be on "
            f"equal footing with new ones:\n{listed}\ngive these as they were, or another --out"
        )
    return Kept({key: StageCost(**cost) for key, cost in pilots.items()}, sizes)


def write_plan(place: Place, settings: dict[str, Any], kept: Kept) -> None:
    """Write down the settings and what is settled so far."""
    place.root.mkdir(parents=True, exist_ok=True)
    content = {
        "schema_version": SCHEMA_VERSION,
        "settings": settings,
        "sizes": {str(factor): asdict(size) for factor, size in kept.sizes.items()},
        "pilots": {key: asdict(cost) for key, cost in kept.costs.items()},
    }
    write_atomic(place.root / PLAN_NAME, (json.dumps(content, indent=1) + "\n").encode())


def check_recipe(place: Place, config: RunConfig, *, with_steps: bool = True) -> None:
    """See that a row's recipe is the one of before, if it has begun; steps too, or not yet.

    Raises ValueError naming the keys that differ.
    """
    path = place.recipe(config.name)
    if not path.is_file():
        return
    found = differences(load_resolved(path), config, free=False)
    changed = [line for line in found if with_steps or not _STEPS.match(line)]
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise ValueError(
            f"{config.name} is another than when its runs began:\n{listed}\n"
            f"put it back, give another --out, or move {place.root / 'runs' / config.name} and "
            f"{path} away to train it anew"
        )


def keep_recipe(place: Place, config: RunConfig) -> None:
    """Write the recipe of a row, or see that it is the one of before (ValueError)."""
    path = place.recipe(config.name)
    check_recipe(place, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, dump_yaml(config).encode())


@contextmanager
def held(place: Place) -> Iterator[None]:
    """Hold the folder against a second call. Raises ValueError if another one has it."""
    place.root.mkdir(parents=True, exist_ok=True)
    with (place.root / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{place.root} is held by another call: wait for it") from None
        yield
