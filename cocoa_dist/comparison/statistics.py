"""Means over seeds, their spread, and differences to the control seed by seed.

Spread is the standard deviation of a sample (n - 1); of one value there is none.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

CUTOFFS = ("r1", "r10")
WAYS = ("t2i", "i2t")


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of n values; `spread` is None for fewer than two."""

    mean: float
    spread: float | None
    n: int

    @property
    def exceeds(self) -> bool | None:
        """Whether the mean is further from 0 than the spread; None where there is no spread."""
        return None if self.spread is None else abs(self.mean) > self.spread


def summarise(values: Sequence[float]) -> Summary | None:
    """Return mean and spread; None for no values."""
    if not values:
        return None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), spread, len(values))


def paired(own: Mapping[int, float], control: Mapping[int, float]) -> Summary | None:
    """Summarise own - control over the seeds that both have; None if they share none."""
    return summarise([own[seed] - control[seed] for seed in sorted(own.keys() & control.keys())])


def metric_names(splits: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (split, way, cutoff) of every number of the table, `both` being the mean of ways."""
    return [(s, way, cut) for s in splits for way in (*WAYS, "both") for cut in CUTOFFS]


def metric(splits: Mapping[str, Any], name: tuple[str, str, str]) -> float:
    """Return one number of a run's scores, in per cent."""
    split, way, cutoff = name
    found = splits[split]
    if way == "both":
        return statistics.fmean(float(found[one][cutoff]) for one in WAYS)
    return float(found[way][cutoff])


def sampling_error(per_cent: float, n: int) -> float:
    """Return the standard error in points of a share of n independent queries."""
    share = min(max(per_cent / 100.0, 0.0), 1.0)
    return 100.0 * math.sqrt(share * (1.0 - share) / max(n, 1))


def spread_in_per_cent(values: Sequence[float]) -> float | None:
    """Return how far values are apart, (largest - smallest) / mean; None for fewer than two."""
    if len(values) < 2 or not sum(values):
        return None
    return 100.0 * (max(values) - min(values)) / statistics.fmean(values)


def as_json(summary: Summary | None) -> dict[str, Any] | None:
    """Return a summary for methods.json, with its plain statement."""
    if summary is None:
        return None
    return {**asdict(summary), "exceeds_spread": summary.exceeds}
