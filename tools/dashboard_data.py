"""The panels of the dashboard of a run's data."""

from dashboard_board import Board, Panel

_RUN = 'run_id="$run"'
_RATE = "[$__rate_interval]"

DATA = Board(
    uid="cocoa-data",
    title="cocoa: data",
    about="Does training wait for data, is its budget filled, what could not be used.",
    one_run=True,
    rows={
        "Waiting": (
            Panel(
                "Share of the steps' time that waits for data",
                "Of the rank that waits longest: all others wait for it. Above 10 % is a ticket.",
                "percentunit",
                {"": f"run_id:cocoa_train_data_wait:ratio5m{{{_RUN}}}"},
                limit=0.1,
            ),
            Panel(
                "Waiting, the ten slowest ranks",
                "Of each second. One node only: look at its disk and network.",
                "percentunit",
                {
                    "{{rank}} on {{node}}": "topk(10, sum by (rank, node) "
                    f'(rate(cocoa_train_phase_seconds_total{{{_RUN}, phase="data_wait"}}{_RATE})))'
                },
            ),
            Panel(
                "Rank 0 waited for its last step",
                "One slow read in many is a peak here.",
                "s",
                {"{{stage}}": f"max by (stage) (cocoa_train_data_wait_seconds{{{_RUN}}})"},
            ),
        ),
        "Filling": (
            Panel(
                "Share of the packs' token budget in use",
                "What is missing is computed for nothing.",
                "percentunit",
                {"{{stage}}": f"max by (stage) (cocoa_train_fill_ratio{{{_RUN}}})"},
            ),
            Panel(
                "Tokens a sample",
                "A jump means other data, or a source that came to its end.",
                "short",
                {
                    "{{stage}}": f"sum by (stage) (rate(cocoa_train_tokens_total{{{_RUN}}}{_RATE}))"
                    f" / sum by (stage) (rate(cocoa_train_samples_total{{{_RUN}}}{_RATE}))"
                },
            ),
            Panel(
                "Texts cut and pictures shrunk, a sample",
                "To data.max_text_tokens and data.image.max_pixels.",
                "percentunit",
                {
                    f"{what}, {{{{stage}}}}": "sum by (stage) "
                    f"(rate(cocoa_data_{name}_total{{{_RUN}}}{_RATE}))"
                    f" / sum by (stage) (rate(cocoa_train_samples_total{{{_RUN}}}{_RATE}))"
                    for what, name in (("cut", "truncated_texts"), ("shrunk", "shrunk_pictures"))
                },
            ),
            Panel(
                "Loaders started again, an hour",
                "A process of a loader had died; RUN/loader_deaths/ says which, and by what.",
                "short",
                {
                    "{{stage}}": "sum by (stage) "
                    f"(increase(cocoa_data_loader_restarts_total{{{_RUN}}}[1h]))"
                },
            ),
        ),
        "Used and unused": (
            Panel(
                "Samples trained on",
                "In each stage, over all incarnations; goes back at a resume.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_consumed_samples{{{_RUN}}})"},
            ),
            Panel(
                "Tokens trained on",
                "In each stage, over all incarnations; goes back at a resume.",
                "short",
                {"{{stage}}": f"max by (stage) (cocoa_train_consumed_tokens{{{_RUN}}})"},
            ),
            Panel(
                "Records that could not be used, in an hour",
                "`quarantine/` in the run folder names each.",
                "none",
                {
                    "{{rank}} on {{node}}": "topk(10, sum by (rank, node) "
                    f"(increase(cocoa_data_bad_records_total{{{_RUN}}}[1h])))"
                },
                limit=1,
            ),
        ),
    },
)
