"""What rank 0 says of the run, its steps and its checkpoints."""

from cocoa_dist.registry.kinds import Metric, Source, counter, gauge, histogram
from cocoa_dist.registry.words import PHASES

_STEP_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 300.0)
_SAVE_BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)

STEPS: tuple[Metric, ...] = (
    gauge(
        "cocoa_run_info",
        Source.RANK_0,
        "1",
        "What runs; constant 1.",
        labels={"recipe": 1, "method": 1, "epoch": 1, "restart": 1, "world_size": 1, "config": 1},
    ),
    gauge(
        "cocoa_train_phase",
        Source.RANK_0,
        "0 or 1",
        "1 for the phase the run is in.",
        labels={"phase": len(PHASES)},
    ),
    gauge(
        "cocoa_train_step",
        Source.RANK_0,
        "steps",
        "Optimizer steps done in this stage; goes back at a resume.",
        record="step",
    ),
    gauge("cocoa_train_target_steps", Source.RANK_0, "steps", "Optimizer steps of this stage."),
    gauge(
        "cocoa_train_consumed_samples",
        Source.RANK_0,
        "samples",
        "Samples trained on in this stage, over all incarnations; goes back at a resume.",
    ),
    gauge(
        "cocoa_train_consumed_tokens",
        Source.RANK_0,
        "tokens",
        "Tokens trained on in this stage, over all incarnations; goes back at a resume.",
    ),
    counter(
        "cocoa_train_samples_total",
        Source.RANK_0,
        "samples",
        "Samples of all ranks since this process started; for rates.",
        record="samples",
    ),
    counter(
        "cocoa_train_tokens_total",
        Source.RANK_0,
        "tokens",
        "Tokens of all ranks since this process started; for rates.",
        record="tokens",
    ),
    histogram(
        "cocoa_train_step_seconds",
        Source.RANK_0,
        "seconds",
        "Wall time of a step, waiting for data included.",
        buckets=_STEP_BUCKETS,
        record="step_seconds",
    ),
    gauge(
        "cocoa_train_data_wait_seconds",
        Source.RANK_0,
        "seconds",
        "How long rank 0 waited for the data of the last step.",
        record="data_wait_seconds",
    ),
    counter(
        "cocoa_train_cpu_seconds_total",
        Source.RANK_0,
        "seconds",
        "CPU time of all ranks inside steps, one step behind.",
        record="cpu_seconds",
    ),
    counter(
        "cocoa_train_model_flops_total",
        Source.RANK_0,
        "FLOPs",
        "What the model needs for the real tokens of all ranks, forward and backward.",
        record="model_flops",
    ),
    gauge(
        "cocoa_train_mfu_ratio",
        Source.RANK_0,
        "ratio",
        "Those FLOPs of the last step over what the GPUs could have done; none on a CPU.",
        record="mfu",
        needs_gpu=True,
    ),
    gauge(
        "cocoa_train_compiled_graphs",
        Source.RANK_0,
        "graphs",
        "What model.compile_layers has had compiled on rank 0; 0 where it is off.",
        record="compiled_graphs",
    ),
    gauge(
        "cocoa_train_compile_stopped",
        Source.RANK_0,
        "0 or 1",
        "1 since layers run without torch.compile again: it failed, or went on without end.",
        record="compile_stopped",
    ),
    gauge(
        "cocoa_train_fill_ratio",
        Source.RANK_0,
        "ratio",
        "Share of the packs' token budget that was used, mean over ranks.",
        record="fill_ratio",
    ),
    counter(
        "cocoa_data_truncated_texts_total",
        Source.RANK_0,
        "texts",
        "Texts that were cut to data.max_text_tokens, all ranks.",
        record="truncated_texts",
    ),
    counter(
        "cocoa_data_shrunk_pictures_total",
        Source.RANK_0,
        "pictures",
        "Pictures that had more than data.image.max_pixels, all ranks.",
        record="shrunk_pictures",
    ),
    counter(
        "cocoa_data_loader_restarts_total",
        Source.RANK_0,
        "restarts",
        "Times a rank started its loader's processes again because one had died, all ranks.",
        record="loader_restarts",
    ),
)

CHECKPOINTS: tuple[Metric, ...] = (
    gauge(
        "cocoa_checkpoint_every_steps",
        Source.RANK_0,
        "steps",
        "Planned distance of two checkpoints.",
    ),
    histogram(
        "cocoa_checkpoint_save_seconds",
        Source.RANK_0,
        "seconds",
        "From the copy to the rename, of saves that were committed.",
        buckets=_SAVE_BUCKETS,
        record="checkpoint_seconds",
    ),
    counter(
        "cocoa_checkpoint_blocked_seconds_total",
        Source.RANK_0,
        "seconds",
        "Time training stood still for saves.",
        record="checkpoint_blocked_seconds",
    ),
    gauge(
        "cocoa_checkpoint_waits",
        Source.RANK_0,
        "saves",
        "Saves of this incarnation that had to wait for the one before.",
        record="saves_waited",
    ),
    gauge(
        "cocoa_checkpoint_last_success_step",
        Source.RANK_0,
        "steps",
        "Step of the newest committed checkpoint of this stage; 0 before the first.",
    ),
    gauge(
        "cocoa_checkpoint_last_success_timestamp_seconds",
        Source.RANK_0,
        "seconds since 1970",
        "When the newest checkpoint of this stage was committed; absent before the first.",
    ),
    gauge(
        "cocoa_checkpoint_bytes",
        Source.RANK_0,
        "bytes",
        "Size of the newest checkpoint that this incarnation committed.",
    ),
    counter(
        "cocoa_checkpoint_failures_total",
        Source.RANK_0,
        "saves",
        "Saves that failed; each is tried again, up to checkpoint.max_failed_saves in a row.",
    ),
)
