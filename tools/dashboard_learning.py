"""The panels of the dashboard about learning."""

from dashboard_board import Board, Panel

_RUN = 'run_id="$run"'

LEARNING = Board(
    uid="cocoa-learning",
    title="cocoa: learning",
    about="Does it learn: losses and their parts, gradients, steps that were left out.",
    one_run=True,
    rows={
        "Loss": (
            Panel(
                "Loss",
                "The sum that is minimised, last step of each stage.",
                "short",
                {"{{stage}}": f'max by (stage) (cocoa_train_loss{{{_RUN}, name="loss"}})'},
                width=12,
            ),
            Panel(
                "Its parts",
                "Texts and contrast in nats, pictures as squared error of patches.",
                "short",
                {
                    "{{stage}} {{name}}": "max by (stage, name) "
                    f'(cocoa_train_loss{{{_RUN}, name!="loss"}})'
                },
                width=12,
            ),
        ),
        "Gradient": (
            Panel(
                "Gradient norm",
                "Before clipping.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_grad_norm{{{_RUN}}})"},
                log_scale=True,
            ),
            Panel(
                "Learning rate",
                "Of the last step.",
                "sci",
                {"{{stage}}": f"max by (stage) (cocoa_train_learning_rate{{{_RUN}}})"},
            ),
            Panel(
                "Loss above its median",
                "In robust standard deviations; no number until enough steps are known.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_loss_deviations{{{_RUN}}})"},
            ),
        ),
        "Groups of parameters": (
            Panel(
                "Gradient norm by group",
                "Their squares add up to the gradient's. Every metrics.measure_every_steps.",
                "short",
                {
                    "{{stage}} {{group}}": "max by (stage, group) "
                    f"(cocoa_train_group_grad_norm{{{_RUN}}})"
                },
                log_scale=True,
                width=12,
            ),
            Panel(
                "Update over weight by group",
                "How far a step moves the weights. Around 1e-3 is usual; a group near 0 is idle.",
                "sci",
                {
                    "{{stage}} {{group}}": "max by (stage, group) "
                    f"(cocoa_train_update_ratio{{{_RUN}}})"
                },
                log_scale=True,
                width=12,
            ),
        ),
        "Held-out": (
            Panel(
                "Recall at 10",
                "On held-out sets while the stage trains (evaluation.every_steps).",
                "percentunit",
                {
                    "{{stage}} {{set}}": "max by (stage, set) "
                    f"(cocoa_evaluation_recall_ratio{{{_RUN}}})"
                },
                width=12,
            ),
            Panel(
                "Tied scores",
                "Queries whose right candidate ties with another. All of them: a collapse.",
                "percentunit",
                {
                    "{{stage}} {{set}}": "max by (stage, set) "
                    f"(cocoa_evaluation_tied_ratio{{{_RUN}}})"
                },
                width=12,
            ),
        ),
        "Steps": (
            Panel(
                "Steps without a finite loss or gradient, in half an hour",
                "They moved no weight. Three are a page.",
                "none",
                {"": f"sum(increase(cocoa_train_skipped_steps_total{{{_RUN}}}[30m]))"},
                limit=2.5,
            ),
            Panel(
                "Loss spikes in an hour",
                "Steps whose loss was above guards.spike_deviations.",
                "none",
                {"": f"sum(increase(cocoa_train_loss_spikes_total{{{_RUN}}}[1h]))"},
                limit=1,
            ),
            Panel(
                "Step",
                "Goes back at a resume.",
                "none",
                {"{{stage}}": f"max by (stage) (cocoa_train_step{{{_RUN}}})"},
            ),
        ),
        "Reconstruction": (
            Panel(
                "Tokens guessed right",
                "Of those that were asked for.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_token_accuracy_ratio{{{_RUN}}})"},
            ),
            Panel(
                "Tokens asked for",
                "Of all tokens of text, as drawn.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_asked_token_ratio{{{_RUN}}})"},
            ),
            Panel(
                "Visual tokens hidden",
                "Of all of them, as drawn.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_hidden_patch_ratio{{{_RUN}}})"},
            ),
        ),
        "Embeddings": (
            Panel(
                "Alignment",
                "Mean squared distance of a query to its target: 0 is together, 2 is unrelated.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_alignment{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Uniformity",
                "Of the targets. Near 0 they are all alike: a collapse.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_uniformity{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Effective rank",
                "Dimensions in which targets differ; it cannot be more than pairs in a step.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_effective_rank{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "False negatives left out",
                "Candidates that show the same thing as the target.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_false_negative_ratio{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Temperature",
                "Where it is learnt.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_temperature{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Compression tokens to each other",
                "Mean cosine. Near 1 they all say the same.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_token_similarity{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Hard negatives that are missing",
                "Of those that data.negatives asks for.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_missing_negative_ratio{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Hard negatives left out",
                "What a query looks for, or lies too close to it.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_hidden_negative_ratio{{{_RUN}}})"},
                width=6,
            ),
            Panel(
                "Learnt bias",
                "Of the sigmoid loss.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_similarity_bias{{{_RUN}}})"},
                width=6,
            ),
        ),
    },
)
