"""Compare two runs step by step: losses, and which records each step took.

    python tools/compare_runs.py RUN_A RUN_B [--tolerance 1e-6]

Says "identical", or names the first step that differs and the largest difference; exit code 1 if
they differ, 2 for bad input. Wall times, CPU times and incarnations are not compared.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.metrics import METRICS_NAME, read_json_lines  # noqa: E402

EXACT_KEYS = ("batch_digest", "samples", "tokens")
Steps = Mapping[tuple[str, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """One value that differs; `size` is infinite where it is no number."""

    where: tuple[str, int]  # stage, step
    key: str
    left: object
    right: object
    size: float

    def describe(self) -> str:
        """Say it in one line."""
        stage, step = self.where
        return f"{stage} step {step}: {self.key} {self.left!r} and {self.right!r}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the verdict; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", type=Path, help="run folder, or a metrics.jsonl")
    parser.add_argument("run_b", type=Path, help="run folder, or a metrics.jsonl")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of a loss (default 0)"
    )
    arguments = parser.parse_args(argv)
    try:
        left, right = read_steps(arguments.run_a), read_steps(arguments.run_b)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    differences = compare(left, right, tolerance=arguments.tolerance)
    if not differences:
        within = f" within {arguments.tolerance:g}" if arguments.tolerance else ""
        print(f"identical{within}: {len(left)} steps")
        return 0
    print(f"{len(differences)} differences over {len(left)} and {len(right)} steps")
    print(f"first:   {differences[0].describe()}")
    numbers = [one for one in differences if math.isfinite(one.size)]
    if numbers:
        largest = max(numbers, key=lambda one: one.size)
        print(f"largest: {largest.describe()} ({largest.size:.3g})")
    return 1


def read_steps(path: Path) -> Steps:
    """Read the steps of a run in order. Raises ValueError if there are none."""
    file = path / METRICS_NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected a run folder or a {METRICS_NAME}")
    try:
        steps = {(line["stage"], line["step"]): line for line in read_json_lines(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold steps, one JSON object a line: {error!r}") from None
    if not steps:
        raise ValueError(f"{file} holds no steps")
    return steps


def compare(left: Steps, right: Steps, *, tolerance: float) -> list[Difference]:
    """Return all differences, in the order of the steps of `left`, then of `right`."""
    found = []
    for where in [*left, *(where for where in right if where not in left)]:
        one, other = left.get(where), right.get(where)
        if one is None or other is None:
            sides = ("there" if one else "missing", "there" if other else "missing")
            found.append(Difference(where, "step", *sides, size=math.inf))
            continue
        for key in EXACT_KEYS:
            if one.get(key) != other.get(key):
                found.append(Difference(where, key, one.get(key), other.get(key), size=math.inf))
        for key in [key for key in {**one, **other} if key.partition("/")[0] == "loss"]:
            size = _gap(one.get(key), other.get(key))
            if size > tolerance:
                found.append(Difference(where, key, one.get(key), other.get(key), size=size))
    return found


def _gap(left: object, right: object) -> float:
    """Return how far two values are apart; two NaN are equal, a missing one is infinitely far."""
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return 0.0 if left == right else math.inf
    if left == right or (math.isnan(left) and math.isnan(right)):
        return 0.0
    gap = abs(left - right)
    return math.inf if math.isnan(gap) else gap


if __name__ == "__main__":
    sys.exit(main())
