"""Every expression of every dashboard, asked of a real Prometheus that scrapes a real run."""

import math
import sys
from pathlib import Path

import pytest
from live_prometheus import Prometheus, end, launch, wait

from cocoa_dist.metrics import METRICS

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from dashboard_board import expressions
from dashboard_panels import BOARDS

# No number until many steps are known, before a contrastive stage, or without the option.
MAY_BE_NAN = (
    "cocoa_train_loss_deviations",
    "cocoa_train_alignment",
    "cocoa_train_uniformity",
    "cocoa_train_effective_rank",
    "cocoa_train_false_negative_ratio",
    "cocoa_train_temperature",
    "cocoa_train_token_similarity",
    "cocoa_train_missing_negative_ratio",
    "cocoa_train_hidden_negative_ratio",
    "cocoa_train_similarity_bias",
)
ON_GPUS = [metric.name for metric in METRICS.values() if metric.needs_gpu]


def has_data(prometheus: Prometheus, expression: str) -> bool:
    """Whether an expression gives at least one series with a number."""
    asked = expression.replace("$__rate_interval", "30s").replace("$run", "run")
    numbers = [float(series["value"][1]) for series in prometheus.ask(asked)]
    if any(name in expression for name in MAY_BE_NAN):
        return bool(numbers)
    return any(map(math.isfinite, numbers))


@pytest.mark.slow
def test_every_panel_shows_something_of_a_short_run(tmp_path: Path, prometheus: Prometheus) -> None:
    (tmp_path / "targets").mkdir()
    launcher = launch(tmp_path, "evaluation.every_steps=20", "budget_gpu_hours=1")
    asked = [query for board in BOARDS.values() for query in expressions(board)]
    missing = [query for query in asked if not any(name in query for name in ON_GPUS)]

    def all_asked() -> bool:
        missing[:] = [query for query in missing if not has_data(prometheus, query)]
        return not missing

    try:
        wait(lambda: prometheus.ask("cocoa_checkpoint_bytes > 0"), "no save", seconds=150)
        try:
            wait(all_asked, "", seconds=60)
        except AssertionError:
            pytest.fail("without data:\n" + "\n".join(missing))
    finally:
        end(launcher)
