"""What rank 0 says of whether the model learns."""

from cocoa_dist.registry.kinds import Metric, Source, counter, gauge

_MOST_LOSSES = 12

LEARNING: tuple[Metric, ...] = (
    gauge(
        "cocoa_train_loss",
        Source.RANK_0,
        "nats, or squared error of patches",
        "Loss of the last step and its parts; name `loss` is the sum that is minimised.",
        labels={"name": _MOST_LOSSES},
        record="loss",
    ),
    gauge(
        "cocoa_train_grad_norm",
        Source.RANK_0,
        "1",
        "Norm of the gradient before clipping.",
        record="grad_norm",
    ),
    gauge(
        "cocoa_train_learning_rate",
        Source.RANK_0,
        "1",
        "Learning rate of the last step.",
        record="learning_rate",
    ),
    gauge(
        "cocoa_train_loss_deviations",
        Source.RANK_0,
        "robust standard deviations",
        "How far the loss lies above the median of the steps before.",
        record="loss_deviations",
    ),
    gauge(
        "cocoa_train_token_accuracy_ratio",
        Source.RANK_0,
        "ratio",
        "Share of the tokens asked for that the model guesses right; reconstruction only.",
        record="token_accuracy",
    ),
    gauge(
        "cocoa_train_asked_token_ratio",
        Source.RANK_0,
        "ratio",
        "Share of all tokens of text that are asked for, as drawn; reconstruction only.",
        record="asked_token_ratio",
    ),
    gauge(
        "cocoa_train_hidden_patch_ratio",
        Source.RANK_0,
        "ratio",
        "Share of all visual tokens that are hidden, as drawn; reconstruction only.",
        record="hidden_patch_ratio",
    ),
    gauge(
        "cocoa_train_alignment",
        Source.RANK_0,
        "squared distance",
        "Mean squared distance of a query to its target, of unit vectors; contrastive only.",
        record="alignment",
    ),
    gauge(
        "cocoa_train_uniformity",
        Source.RANK_0,
        "nats",
        "Log of the mean of exp(-2 squared distance) over targets; 0 is a collapse; contrastive.",
        record="uniformity",
    ),
    gauge(
        "cocoa_train_effective_rank",
        Source.RANK_0,
        "dimensions",
        "Dimensions in which the targets really differ; 1 is a collapse; contrastive only.",
        record="effective_rank",
    ),
    gauge(
        "cocoa_train_false_negative_ratio",
        Source.RANK_0,
        "ratio",
        "Share of candidates that show the same thing as the target and are left out; contrastive.",
        record="false_negative_ratio",
    ),
    counter(
        "cocoa_train_loss_spikes_total",
        Source.RANK_0,
        "steps",
        "Steps whose loss was above guards.spike_deviations.",
        record="loss_spike",
    ),
    counter(
        "cocoa_train_skipped_steps_total",
        Source.RANK_0,
        "steps",
        "Steps that moved no weight because loss or gradient was not finite.",
        record="skipped",
    ),
)
