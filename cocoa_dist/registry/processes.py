"""What every rank says for itself, and what ranks and launcher alike say of their monitoring."""

from cocoa_dist.registry.kinds import Metric, Source, counter, gauge
from cocoa_dist.registry.words import FAULTS, TIMED

EVERY_RANK: tuple[Metric, ...] = (
    gauge(
        "cocoa_train_last_step_timestamp_seconds",
        Source.EVERY_RANK,
        "seconds since 1970",
        "End of this rank's last step, or of the save or evaluation that came after it.",
    ),
    gauge(
        "cocoa_train_stepping",
        Source.EVERY_RANK,
        "0 or 1",
        "1 while this rank makes steps, after its first; 0 in start, restore, save, evaluation.",
    ),
    gauge(
        "cocoa_train_median_step_seconds",
        Source.EVERY_RANK,
        "seconds",
        "Median wall time of the last 64 steps of this rank, waiting for data included.",
    ),
    counter(
        "cocoa_train_phase_seconds_total",
        Source.EVERY_RANK,
        "seconds",
        "Wall time of this rank's main thread by what it did.",
        labels={"phase": len(TIMED)},
    ),
    counter(
        "cocoa_train_peer_wait_seconds_total",
        Source.EVERY_RANK,
        "seconds",
        "Time inside steps that this rank waited for others in the sums over ranks.",
    ),
    gauge(
        "cocoa_gpu_memory_bytes",
        Source.EVERY_RANK,
        "bytes",
        "Memory of this rank's GPU as torch keeps it, now and then; none on a CPU.",
        labels={"kind": 3},
        needs_gpu=True,
    ),
    counter(
        "cocoa_gpu_alloc_retries_total",
        Source.EVERY_RANK,
        "allocations",
        "Allocations that first had to empty torch's cache; a GPU is nearly full. None on a CPU.",
        needs_gpu=True,
    ),
    counter(
        "cocoa_data_bad_records_total",
        Source.EVERY_RANK,
        "records",
        "Uses of records that this rank had to leave out.",
    ),
    gauge(
        "cocoa_process_resident_bytes",
        Source.EVERY_RANK,
        "bytes",
        "Resident memory of the process, without its data workers.",
    ),
    counter(
        "cocoa_process_cpu_seconds_total",
        Source.EVERY_RANK,
        "seconds",
        "CPU time of the process, user and system, all threads, without its data workers.",
    ),
)

EVERYBODY: tuple[Metric, ...] = (
    counter(
        "cocoa_exporter_faults_total",
        Source.EVERYBODY,
        "faults",
        "What of the monitoring could not be done (the run goes on without it).",
        labels={"reason": len(FAULTS)},
    ),
    counter(
        "cocoa_exporter_dropped_values_total",
        Source.EVERYBODY,
        "values",
        "Values that were dropped because the registry has no such metric or label value.",
    ),
)
