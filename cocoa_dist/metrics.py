"""What a run says about itself in numbers: `metrics.jsonl`, and every metric Prometheus may see.

`metrics.jsonl`: one object per optimizer step, appended by rank 0 in one write, cut back to the
checkpoint at a resume, so that it never holds two objects of one (stage, step) and always tells the
history that counts. METRICS declares each exported metric once; docs/metrics.md is made from it,
the rules in ops/ are checked against it, and exporter.py refuses any other name.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cocoa_dist.manifest import write_atomic
from cocoa_dist.metric_kinds import Kind as Kind
from cocoa_dist.metric_kinds import Metric as Metric
from cocoa_dist.metric_kinds import Source as Source

METRICS_NAME = "metrics.jsonl"


class JsonLines:
    """An append-only file of JSON objects, one a line; each append is one write call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor: int | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Append one object. Raises OSError if the disk is full."""
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._descriptor = os.open(self.path, flags, 0o644)
        line = (json.dumps(record) + "\n").encode()
        written = os.write(self._descriptor, line)
        if written != len(line):
            full = f"{os.strerror(errno.ENOSPC)} (wrote {written} of {len(line)} bytes)"
            raise OSError(errno.ENOSPC, full, str(self.path))

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; a torn last line (a killed writer's) is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no JSON object ({error}); take that line out"
                ) from error


def cut_back(path: Path, *, stage: str, step: int) -> int:
    """Drop a stage's objects behind `step`; return how many. Objects without a stage count too.

    Called at a resume, before the first append: those steps will be done again. Other stages keep
    theirs, as they keep their checkpoints.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for record in read_json_lines(path):
        if record.get("stage", stage) == stage and record["step"] > step:
            dropped += 1
        else:
            kept.append(json.dumps(record))
    write_atomic(path, "".join(line + "\n" for line in kept).encode())
    return dropped


PHASES = ("start", "restore", "train", "checkpoint", "evaluation")
TIMED = ("start", "restore", "step", "data_wait", "checkpoint", "evaluation")
CAUSES = (  # of the goodput ledger, see launcher/ledger.py
    "productive",
    "queue",
    "start",
    "restore",
    "data_wait",
    "checkpoint",
    "evaluation",
    "replay",
    "hang",
    "unknown",
)
RUN_STATES = ("pending", "running", "preempted", "stalled", "stopped", "given_up", "done")
RESTART_REASONS = ("preempted", "stopped", "crash", "lost", "bad_input")
FAULTS = ("port", "target", "events", "files")
_MOST_STAGES, _MOST_LOSSES = 8, 12
_STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 300.0)
_SAVE_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)


def _counter(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    return Metric(name, Kind.COUNTER, text, unit, source, **more)


def _gauge(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    return Metric(name, Kind.GAUGE, text, unit, source, **more)


def _histogram(name: str, source: Source, unit: str, text: str, **more: Any) -> Metric:
    return Metric(name, Kind.HISTOGRAM, text, unit, source, **more)


_EVERY_RANK = (
    _gauge(
        "cocoa_train_last_step_timestamp_seconds",
        Source.EVERY_RANK,
        "seconds since 1970",
        "End of this rank's last step, or of the save or evaluation that came after it.",
    ),
    _gauge(
        "cocoa_train_stepping",
        Source.EVERY_RANK,
        "0 or 1",
        "1 while this rank makes steps, after its first; 0 in start, restore, save, evaluation.",
    ),
    _gauge(
        "cocoa_train_median_step_seconds",
        Source.EVERY_RANK,
        "seconds",
        "Median wall time of the last 64 steps of this rank, waiting for data included.",
    ),
    _counter(
        "cocoa_train_phase_seconds_total",
        Source.EVERY_RANK,
        "seconds",
        "Wall time of this rank's main thread by what it did.",
        labels={"phase": len(TIMED)},
    ),
    _counter(
        "cocoa_data_bad_records_total",
        Source.EVERY_RANK,
        "records",
        "Uses of records that this rank had to leave out.",
    ),
    _gauge(
        "cocoa_process_resident_bytes",
        Source.EVERY_RANK,
        "bytes",
        "Resident memory of the process, without its data workers.",
    ),
    _counter(
        "cocoa_process_cpu_seconds_total",
        Source.EVERY_RANK,
        "seconds",
        "CPU time of the process, user and system, all threads, without its data workers.",
    ),
)

_EVERYBODY = (
    _counter(
        "cocoa_exporter_faults_total",
        Source.EVERYBODY,
        "faults",
        "What of the monitoring could not be done (the run goes on without it).",
        labels={"reason": len(FAULTS)},
    ),
    _counter(
        "cocoa_exporter_dropped_values_total",
        Source.EVERYBODY,
        "values",
        "Values that were dropped because the registry has no such metric or label value.",
    ),
)

_RANK_0 = (
    _gauge(
        "cocoa_run_info",
        Source.RANK_0,
        "1",
        "What runs; constant 1.",
        labels={"recipe": 1, "method": 1, "epoch": 1, "restart": 1, "world_size": 1, "config": 1},
    ),
    _gauge(
        "cocoa_train_phase",
        Source.RANK_0,
        "0 or 1",
        "1 for the phase the run is in.",
        labels={"phase": len(PHASES)},
    ),
    _gauge(
        "cocoa_train_step",
        Source.RANK_0,
        "steps",
        "Optimizer steps done in this stage; goes back at a resume.",
        record="step",
    ),
    _gauge("cocoa_train_target_steps", Source.RANK_0, "steps", "Optimizer steps of this stage."),
    _gauge(
        "cocoa_train_consumed_samples",
        Source.RANK_0,
        "samples",
        "Samples trained on in this stage, over all incarnations; goes back at a resume.",
    ),
    _gauge(
        "cocoa_train_consumed_tokens",
        Source.RANK_0,
        "tokens",
        "Tokens trained on in this stage, over all incarnations; goes back at a resume.",
    ),
    _counter(
        "cocoa_train_samples_total",
        Source.RANK_0,
        "samples",
        "Samples of all ranks since this process started; for rates.",
        record="samples",
    ),
    _counter(
        "cocoa_train_tokens_total",
        Source.RANK_0,
        "tokens",
        "Tokens of all ranks since this process started; for rates.",
        record="tokens",
    ),
    _histogram(
        "cocoa_train_step_seconds",
        Source.RANK_0,
        "seconds",
        "Wall time of a step, waiting for data included.",
        buckets=_STEP_BUCKETS,
        record="step_seconds",
    ),
    _gauge(
        "cocoa_train_data_wait_seconds",
        Source.RANK_0,
        "seconds",
        "How long rank 0 waited for the data of the last step.",
        record="data_wait_seconds",
    ),
    _counter(
        "cocoa_train_cpu_seconds_total",
        Source.RANK_0,
        "seconds",
        "CPU time of all ranks inside steps, one step behind.",
        record="cpu_seconds",
    ),
    _gauge(
        "cocoa_train_fill_ratio",
        Source.RANK_0,
        "ratio",
        "Share of the packs' token budget that was used, mean over ranks.",
        record="fill_ratio",
    ),
    _gauge(
        "cocoa_train_loss",
        Source.RANK_0,
        "nats, or squared error of patches",
        "Loss of the last step and its parts; name `loss` is the sum that is minimised.",
        labels={"name": _MOST_LOSSES},
        record="loss",
    ),
    _gauge(
        "cocoa_train_grad_norm",
        Source.RANK_0,
        "1",
        "Norm of the gradient before clipping.",
        record="grad_norm",
    ),
    _gauge(
        "cocoa_train_learning_rate",
        Source.RANK_0,
        "1",
        "Learning rate of the last step.",
        record="learning_rate",
    ),
    _gauge(
        "cocoa_train_loss_deviations",
        Source.RANK_0,
        "robust standard deviations",
        "How far the loss lies above the median of the steps before.",
        record="loss_deviations",
    ),
    _gauge(
        "cocoa_train_token_accuracy_ratio",
        Source.RANK_0,
        "ratio",
        "Share of the tokens asked for that the model guesses right; reconstruction only.",
        record="token_accuracy",
    ),
    _gauge(
        "cocoa_train_asked_token_ratio",
        Source.RANK_0,
        "ratio",
        "Share of all tokens of text that are asked for, as drawn; reconstruction only.",
        record="asked_token_ratio",
    ),
    _gauge(
        "cocoa_train_hidden_patch_ratio",
        Source.RANK_0,
        "ratio",
        "Share of all visual tokens that are hidden, as drawn; reconstruction only.",
        record="hidden_patch_ratio",
    ),
    _gauge(
        "cocoa_train_alignment",
        Source.RANK_0,
        "squared distance",
        "Mean squared distance of a query to its target, of unit vectors; contrastive only.",
        record="alignment",
    ),
    _gauge(
        "cocoa_train_uniformity",
        Source.RANK_0,
        "nats",
        "Log of the mean of exp(-2 squared distance) over targets; 0 is a collapse; contrastive.",
        record="uniformity",
    ),
    _gauge(
        "cocoa_train_effective_rank",
        Source.RANK_0,
        "dimensions",
        "Dimensions in which the targets really differ; 1 is a collapse; contrastive only.",
        record="effective_rank",
    ),
    _gauge(
        "cocoa_train_false_negative_ratio",
        Source.RANK_0,
        "ratio",
        "Share of candidates that show the same thing as the target and are left out; contrastive.",
        record="false_negative_ratio",
    ),
    _counter(
        "cocoa_train_loss_spikes_total",
        Source.RANK_0,
        "steps",
        "Steps whose loss was above guards.spike_deviations.",
        record="loss_spike",
    ),
    _counter(
        "cocoa_train_skipped_steps_total",
        Source.RANK_0,
        "steps",
        "Steps that moved no weight because loss or gradient was not finite.",
        record="skipped",
    ),
    _counter(
        "cocoa_data_truncated_texts_total",
        Source.RANK_0,
        "texts",
        "Texts that were cut to data.max_text_tokens, all ranks.",
        record="truncated_texts",
    ),
    _gauge(
        "cocoa_checkpoint_every_steps",
        Source.RANK_0,
        "steps",
        "Planned distance of two checkpoints.",
    ),
    _histogram(
        "cocoa_checkpoint_save_seconds",
        Source.RANK_0,
        "seconds",
        "From the copy to the rename, of saves that were committed.",
        buckets=_SAVE_BUCKETS,
        record="checkpoint_seconds",
    ),
    _counter(
        "cocoa_checkpoint_blocked_seconds_total",
        Source.RANK_0,
        "seconds",
        "Time training stood still for saves.",
        record="checkpoint_blocked_seconds",
    ),
    _gauge(
        "cocoa_checkpoint_waits",
        Source.RANK_0,
        "saves",
        "Saves of this incarnation that had to wait for the one before.",
        record="saves_waited",
    ),
    _gauge(
        "cocoa_checkpoint_last_success_step",
        Source.RANK_0,
        "steps",
        "Step of the newest committed checkpoint of this stage; 0 before the first.",
    ),
    _gauge(
        "cocoa_checkpoint_last_success_timestamp_seconds",
        Source.RANK_0,
        "seconds since 1970",
        "When the newest checkpoint of this stage was committed; absent before the first.",
    ),
    _gauge(
        "cocoa_checkpoint_bytes",
        Source.RANK_0,
        "bytes",
        "Size of the newest checkpoint that this incarnation committed.",
    ),
    _counter(
        "cocoa_checkpoint_failures_total",
        Source.RANK_0,
        "saves",
        "Saves that failed; each is tried again, up to checkpoint.max_failed_saves in a row.",
    ),
)

_LAUNCHER = (
    _gauge(
        "cocoa_run_state",
        Source.LAUNCHER,
        "0 or 1",
        "1 for the state that `launcher status` shows.",
        labels={"state": len(RUN_STATES)},
    ),
    _gauge(
        "cocoa_stage_step",
        Source.LAUNCHER,
        "steps",
        "Steps done in each stage.",
        labels={"name": _MOST_STAGES},
    ),
    _gauge(
        "cocoa_stage_target_steps",
        Source.LAUNCHER,
        "steps",
        "Steps of each stage.",
        labels={"name": _MOST_STAGES},
    ),
    _counter(
        "cocoa_run_restarts_total",
        Source.LAUNCHER,
        "starts",
        "Starts that followed an interruption, by how the incarnation before had ended.",
        labels={"reason": len(RESTART_REASONS)},
    ),
    _counter(
        "cocoa_run_replayed_steps_total",
        Source.LAUNCHER,
        "steps",
        "Steps that were done again after a resume.",
    ),
    _gauge(
        "cocoa_run_failed_attempts",
        Source.LAUNCHER,
        "attempts",
        "Crashes in a row without a new checkpoint; at 3 the launcher gives up.",
    ),
    _gauge(
        "cocoa_run_wall_seconds",
        Source.LAUNCHER,
        "seconds",
        "Wall time of the run since its submission, waiting included.",
    ),
    _gauge(
        "cocoa_run_seconds",
        Source.LAUNCHER,
        "seconds",
        "The run's wall time by cause; the causes add up to cocoa_run_wall_seconds.",
        labels={"cause": len(CAUSES)},
    ),
    _gauge(
        "cocoa_run_goodput_ratio",
        Source.LAUNCHER,
        "ratio",
        "Productive share of the run's wall time.",
    ),
    _gauge(
        "cocoa_run_rank_seconds",
        Source.LAUNCHER,
        "seconds",
        "Seconds that ranks were held, added over ranks: what the run has cost.",
    ),
)

METRICS: Mapping[str, Metric] = {
    metric.name: metric for metric in (*_EVERY_RANK, *_RANK_0, *_LAUNCHER, *_EVERYBODY)
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
