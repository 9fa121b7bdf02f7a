"""What the launcher says of the run as a whole."""

from cocoa_dist.registry.kinds import Metric, Source, counter, gauge
from cocoa_dist.registry.words import CAUSES, RESTART_REASONS, RUN_STATES

_MOST_STAGES = 8

LAUNCHER: tuple[Metric, ...] = (
    gauge(
        "cocoa_run_state",
        Source.LAUNCHER,
        "0 or 1",
        "1 for the state that `launcher status` shows.",
        labels={"state": len(RUN_STATES)},
    ),
    gauge(
        "cocoa_stage_step",
        Source.LAUNCHER,
        "steps",
        "Steps done in each stage.",
        labels={"name": _MOST_STAGES},
    ),
    gauge(
        "cocoa_stage_target_steps",
        Source.LAUNCHER,
        "steps",
        "Steps of each stage.",
        labels={"name": _MOST_STAGES},
    ),
    counter(
        "cocoa_run_restarts_total",
        Source.LAUNCHER,
        "starts",
        "Starts that followed an interruption, by how the incarnation before had ended.",
        labels={"reason": len(RESTART_REASONS)},
    ),
    counter(
        "cocoa_run_replayed_steps_total",
        Source.LAUNCHER,
        "steps",
        "Steps that were done again after a resume.",
    ),
    gauge(
        "cocoa_run_failed_attempts",
        Source.LAUNCHER,
        "attempts",
        "Crashes in a row without a new checkpoint; at 3 the launcher gives up.",
    ),
    gauge(
        "cocoa_run_wall_seconds",
        Source.LAUNCHER,
        "seconds",
        "Wall time of the run since its submission, waiting included.",
    ),
    gauge(
        "cocoa_run_seconds",
        Source.LAUNCHER,
        "seconds",
        "The run's wall time by cause; the causes add up to cocoa_run_wall_seconds.",
        labels={"cause": len(CAUSES)},
    ),
    gauge(
        "cocoa_run_goodput_ratio",
        Source.LAUNCHER,
        "ratio",
        "Productive share of the run's wall time.",
    ),
    gauge(
        "cocoa_run_rank_seconds",
        Source.LAUNCHER,
        "seconds",
        "Seconds that ranks were held, added over ranks: what the run has cost.",
    ),
    gauge(
        "cocoa_run_budget_rank_seconds",
        Source.LAUNCHER,
        "seconds",
        "What the run may cost: budget_gpu_hours of the recipe; absent without one.",
    ),
)
