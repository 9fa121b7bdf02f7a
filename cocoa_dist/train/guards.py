"""What is looked at after every step: losses out of the ordinary, and steps that were left out.

Nothing here moves a weight. What a guard finds is written down with the step's records, and a run
that cannot be trusted any more is ended with a ValueError that says what to look at.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from cocoa_dist.config import GuardsConfig
from cocoa_dist.metrics import read_json_lines

_LEAST_HISTORY = 16  # losses before any is called a spike
_SIGMA_OF_MAD = 1.4826  # standard deviation of a normal distribution over its median deviation
_LEAST_SPREAD = 1e-3  # of the median: losses that hardly move make no spike of a ripple
_NAMED = 8  # records that a message names; the file has all


class SpikeDetector:
    """Compares each loss with the median of those before it, in robust standard deviations.

    Median and median absolute deviation, so that a spike does not hide the next one.
    """

    def __init__(self, config: GuardsConfig, *, history: Iterable[float] = ()) -> None:
        """`history`: losses before an interruption, oldest first."""
        self.limit = config.spike_deviations
        self.recent: deque[float] = deque(history, maxlen=config.spike_window)

    def deviations(self, loss: float) -> float | None:
        """Return how far `loss` lies above the median of the window, and take it in.

        None for a loss that is not finite, and while there is too little to compare with.
        """
        if not math.isfinite(loss):
            return None
        least = min(_LEAST_HISTORY, self.recent.maxlen or 0)
        found = self._above_median(loss) if least and len(self.recent) >= least else None
        self.recent.append(loss)
        return found

    def is_spike(self, deviations: float | None) -> bool:
        """Say whether it is more than `guards.spike_deviations`."""
        return deviations is not None and deviations > self.limit

    def _above_median(self, loss: float) -> float:
        middle = statistics.median(self.recent)
        spread = statistics.median(abs(other - middle) for other in self.recent)
        sigma = max(_SIGMA_OF_MAD * spread, _LEAST_SPREAD * abs(middle), 1e-12)
        return (loss - middle) / sigma


def recent_losses(metrics: Path, *, stage: str, count: int) -> list[float]:
    """Return a stage's last finite losses from `metrics.jsonl`, oldest first; [] without a file."""
    found: deque[float] = deque(maxlen=count)
    for record in read_json_lines(metrics):
        if record.get("stage") == stage and isinstance(record.get("loss"), int | float):
            found.append(record["loss"])
    return list(found)


def check_skips(
    config: GuardsConfig,
    *,
    stage: str,
    step: int,
    in_a_row: int,
    in_stage: int,
    records: Sequence[str],
    listed_in: Path,
) -> None:
    """Raise ValueError past the limits on steps whose loss or gradient was not finite."""
    for found, limit, key in (
        (in_a_row, config.max_skipped_in_a_row, "max_skipped_in_a_row"),
        (in_stage, config.max_skipped, "max_skipped"),
    ):
        if found < limit:
            continue
        kind = "in a row" if key.endswith("row") else "in the stage"
        raise ValueError(
            f"{found} steps {kind} were skipped, up to step {step} of {stage}: their loss or "
            f"gradient was not finite (guards.{key}={limit}). Their records are listed in "
            f"{listed_in}, the last ones of this rank: {name_records(records)}. Look at them with "
            "tools/show_batch.py, lower the learning rate, or raise the limit"
        )


def name_records(keys: Sequence[str]) -> str:
    """Return the first few keys, and how many more there are."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
