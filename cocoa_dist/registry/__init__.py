"""Every metric Prometheus may see, declared once.

docs/metrics.md is made from METRICS, the rules in ops/ and the dashboards are checked against it,
and exporter.py refuses any other name. To add a metric, add a line to the module whose subject it
is: `processes` (every rank), `steps` and `learning` (rank 0), `launcher`.
"""

from collections.abc import Mapping

from cocoa_dist.registry.kinds import Kind as Kind
from cocoa_dist.registry.kinds import Metric as Metric
from cocoa_dist.registry.kinds import Source as Source
from cocoa_dist.registry.launcher import LAUNCHER
from cocoa_dist.registry.learning import LEARNING
from cocoa_dist.registry.processes import EVERY_RANK, EVERYBODY
from cocoa_dist.registry.steps import CHECKPOINTS, STEPS

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (*EVERY_RANK, *STEPS, *LEARNING, *CHECKPOINTS, *LAUNCHER, *EVERYBODY)
}
_SCRAPE_SERIES = 5  # that Prometheus itself adds for each target (`up` and its relatives)


def count_series(*, world_size: int) -> int:
    """Return how many series a run of so many ranks has in Prometheus at most."""
    exporters = {
        Source.EVERY_RANK: world_size,
        Source.RANK_0: 1,
        Source.LAUNCHER: 1,
        Source.EVERYBODY: world_size + 1,
    }
    own = sum(metric.most_series * exporters[metric.source] for metric in METRICS.values())
    return own + _SCRAPE_SERIES * (world_size + 1)
