"""What the declaration of a metric is; the metrics themselves are declared beside this module."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


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
    # The field of metrics.jsonl that it is taken from; `loss/`: what stands behind is its label.
    record: str | None = None
    needs_gpu: bool = False  # a run on CPUs does not export it

    @property
    def most_series(self) -> int:
        """Return how many series one process exports of it at most."""
        return math.prod(self.labels.values()) * (len(self.buckets) + 3 if self.buckets else 1)


def counter(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    """Declare what only grows; its name ends in `_total`."""
    return Metric(name, Kind.COUNTER, text, unit, source, **more)


def gauge(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    """Declare what goes up and down."""
    return Metric(name, Kind.GAUGE, text, unit, source, **more)


def histogram(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    """Declare a distribution; `buckets` has the upper bounds."""
    return Metric(name, Kind.HISTOGRAM, text, unit, source, **more)
