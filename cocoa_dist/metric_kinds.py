"""What the declaration of a metric is; the metrics themselves are declared in metrics.py."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What a metric is to Prometheus."""

    COUNTER = "counter"  # only grows while its process lives; `rate()` makes sense
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Who exports a metric: what all ranks would say alike is said once, by rank 0."""

    EVERY_RANK = "every rank"
    RANK_0 = "rank 0"
    LAUNCHER = "launcher"
    EVERYBODY = "every rank and the launcher"


@dataclass(frozen=True)
class Metric:
    """The declaration of one metric."""

    name: str
    kind: Kind
    help: str
    unit: str
    source: Source
    labels: Mapping[str, int] = field(default_factory=dict)  # name: most values it may take
    buckets: tuple[float, ...] = ()  # of a histogram: upper bounds, without infinity
    record: str | None = None  # the field of metrics.jsonl that it is taken from

    @property
    def most_series(self) -> int:
        """Return how many series one process exports of it at most."""
        return math.prod(self.labels.values()) * (len(self.buckets) + 3 if self.buckets else 1)
