"""The panels of the four dashboards: fleet, run, data, learning."""

from dashboard_board import Board, Look, Panel, number
from dashboard_data import DATA
from dashboard_learning import LEARNING

_RUN = 'run_id="$run"'
_RATE = "[$__rate_interval]"

FLEET = Board(
    uid="cocoa-fleet",
    title="cocoa: fleet",
    about="All runs: who moves, who waits, who needs somebody.",
    one_run=False,
    rows={
        "Now": (
            number(
                "Pages",
                "Alerts that want a person now; docs/operators.md has a section on each.",
                "none",
                'count(ALERTS{alertstate="firing", severity="page"}) or vector(0)',
                limit=1,
            ),
            number(
                "Tickets",
                "Alerts that may wait for the morning.",
                "none",
                'count(ALERTS{alertstate="firing", severity="ticket"}) or vector(0)',
            ),
            Panel(
                "Runs by state",
                "As `launcher status` shows them; runs in the queue are not here.",
                "none",
                {"{{state}}": "count by (state) (cocoa_run_state == 1)"},
                look=Look.NUMBER,
            ),
            Panel(
                "Ranks that answer",
                "Targets of ranks that the last scrape reached.",
                "none",
                {"{{run_id}}": 'sum by (run_id) (up{job="cocoa", rank!=""})'},
            ),
        ),
        "Progress": (
            Panel(
                "Stage done",
                "Steps done of the stage at work.",
                "percentunit",
                {"{{run_id}} {{stage}}": "run_id:cocoa_train_progress:ratio"},
                look=Look.BARS,
            ),
            Panel(
                "Tokens per second",
                "Of all ranks, over five minutes.",
                "short",
                {"{{run_id}}": "run_id:cocoa_train_tokens:rate5m"},
            ),
            Panel(
                "Since the last step",
                "Of the rank that moved last. It grows during saves and evaluation, too.",
                "s",
                {
                    "{{run_id}}": "time() - "
                    "max by (run_id) (cocoa_train_last_step_timestamp_seconds)"
                },
            ),
        ),
        "Cost": (
            Panel(
                "Goodput of the last day",
                "Productive share of the wall time.",
                "percentunit",
                {"{{run_id}}": "run_id:cocoa_run_goodput:ratio24h"},
                look=Look.BARS,
                limit=0.85,
                low_is_bad=True,
            ),
            Panel(
                "Where time is lost",
                "Wall time of all runs that was not productive, since their submission.",
                "s",
                {"{{cause}}": 'sum by (cause) (cocoa_run_seconds{cause!="productive"})'},
                look=Look.STACK,
            ),
            Panel(
                "Rank time held",
                "What each run has cost so far, added over its ranks.",
                "s",
                {"{{run_id}}": "max by (run_id) (cocoa_run_rank_seconds)"},
                look=Look.BARS,
            ),
            Panel(
                "Budget",
                "GPU hours used of those that the recipe gives, and what the end will have cost.",
                "percentunit",
                {
                    "{{run_id}} used": "run_id:cocoa_run_budget:ratio",
                    "{{run_id}} at its end": "run_id:cocoa_run_budget:projected",
                },
                look=Look.BARS,
                limit=1.1,
                width=24,
            ),
            Panel(
                "Restarts",
                "Starts after an interruption, by how the incarnation before had ended.",
                "none",
                {"{{run_id}} {{reason}}": "sum by (run_id, reason) (cocoa_run_restarts_total)"},
                look=Look.TABLE,
                width=12,
            ),
            Panel(
                "Steps that are in no checkpoint",
                "What a crash would cost now.",
                "none",
                {
                    "{{run_id}}": "max by (run_id) (cocoa_train_step) - "
                    "max by (run_id) (cocoa_checkpoint_last_success_step)"
                },
                width=12,
            ),
        ),
    },
)

RUN = Board(
    uid="cocoa-run",
    title="cocoa: one run",
    about="Does it move, what does it wait for, what would a crash cost.",
    one_run=True,
    rows={
        "Now": (
            Panel(
                "What runs",
                "The incarnation at work.",
                "none",
                {
                    "": "max by (recipe, method, epoch, restart, world_size, config) "
                    f"(cocoa_run_info{{{_RUN}}})"
                },
                look=Look.TABLE,
                width=12,
            ),
            Panel(
                "State",
                "As `launcher status` shows it.",
                "none",
                {"{{state}}": f"max by (state) (cocoa_run_state{{{_RUN}}}) == 1"},
                look=Look.NUMBER,
                width=4,
            ),
            Panel(
                "Phase",
                "What rank 0 does.",
                "none",
                {"{{phase}}": f"max by (phase) (cocoa_train_phase{{{_RUN}}}) == 1"},
                look=Look.NUMBER,
                width=4,
            ),
            number(
                "Time left in this stage",
                "At the median step of the last 64.",
                "s",
                f"(max(cocoa_train_target_steps{{{_RUN}}}) - max(cocoa_train_step{{{_RUN}}}))"
                f" * max(cocoa_train_median_step_seconds{{{_RUN}}})",
            ),
            Panel(
                "Stages",
                "Steps done of each stage.",
                "percentunit",
                {
                    "{{name}}": f"max by (name) (cocoa_stage_step{{{_RUN}}}) / "
                    f"max by (name) (cocoa_stage_target_steps{{{_RUN}}})"
                },
                look=Look.BARS,
                width=16,
            ),
            Panel(
                "Ranks",
                "Those that the last scrape reached, and those that are inside a step.",
                "none",
                {
                    "answer": f'sum(up{{job="cocoa", rank!="", {_RUN}}})',
                    "inside steps": f"sum(cocoa_train_stepping{{{_RUN}}})",
                },
            ),
        ),
        "Speed": (
            Panel(
                "Throughput",
                "Of all ranks, over five minutes.",
                "short",
                {
                    "tokens/s": f"run_id:cocoa_train_tokens:rate5m{{{_RUN}}}",
                    "samples/s": f"run_id:cocoa_train_samples:rate5m{{{_RUN}}}",
                },
                log_scale=True,
            ),
            Panel(
                "Step time",
                "Waiting for data included. A wide band is jitter.",
                "s",
                {
                    "median": "histogram_quantile(0.5, sum by (le) "
                    f"(rate(cocoa_train_step_seconds_bucket{{{_RUN}}}{_RATE})))",
                    "95 %": "histogram_quantile(0.95, sum by (le) "
                    f"(rate(cocoa_train_step_seconds_bucket{{{_RUN}}}{_RATE})))",
                    "median of the last 64": f"run_id:cocoa_train_step_seconds:median{{{_RUN}}}",
                },
            ),
            Panel(
                "Since the last step, the ten oldest ranks",
                "Alike on all ranks while they wait for one; the one that hangs may not answer.",
                "s",
                {
                    "{{rank}} on {{node}}": "topk(10, time() - max by (rank, node) "
                    f"(cocoa_train_last_step_timestamp_seconds{{{_RUN}}}))"
                },
            ),
            Panel(
                "What the main thread does",
                "Mean over ranks, of each second.",
                "percentunit",
                {
                    "{{phase}}": "avg by (phase) "
                    f"(rate(cocoa_train_phase_seconds_total{{{_RUN}}}{_RATE}))"
                },
                look=Look.STACK,
            ),
            Panel(
                "Memory, the ten largest ranks",
                "Resident, without data workers. A line that only climbs is a leak.",
                "bytes",
                {
                    "{{rank}} on {{node}}": "topk(10, max by (rank, node) "
                    f"(cocoa_process_resident_bytes{{{_RUN}}}))"
                },
            ),
            Panel(
                "CPU cores in use, the ten idlest ranks",
                "A rank that hangs uses none.",
                "short",
                {
                    "{{rank}} on {{node}}": "bottomk(10, max by (rank, node) "
                    f'(rate(cocoa_process_cpu_seconds_total{{{_RUN}, rank!=""}}{_RATE})))',
                    "all ranks, inside steps": f"sum(rate(cocoa_train_cpu_seconds_total{{{_RUN}}}"
                    f"{_RATE}))",
                },
            ),
        ),
        "Ranks and GPUs": (
            Panel(
                "Slowest ranks",
                "Time of each second that a rank needs for itself. One name for long: a straggler.",
                "percentunit",
                {
                    "slowest: {{rank}}": f"run_id_rank:cocoa_train_own_seconds:slowest{{{_RUN}}}",
                    "{{rank}}": f"topk(5, run_id_rank:cocoa_train_own_seconds:rate5m{{{_RUN}}})",
                },
                width=6,
            ),
            Panel(
                "Slowest rank over the median one",
                "1 is even. What is above is waited for by all others.",
                "short",
                {"": f"run_id:cocoa_train_own_seconds:max_over_median{{{_RUN}}}"},
                limit=1.25,
                width=6,
            ),
            Panel(
                "GPU memory, the fullest ranks",
                "As torch keeps it. Nothing on CPUs.",
                "bytes",
                {
                    "{{rank}} {{kind}}": "topk by (kind) (3, max by (rank, kind) "
                    f"(cocoa_gpu_memory_bytes{{{_RUN}}}))",
                    "retries in an hour": "sum(increase("
                    f"cocoa_gpu_alloc_retries_total{{{_RUN}}}[1h]))",
                },
                width=6,
            ),
            Panel(
                "Use of the GPUs",
                "FLOPs that the model needs, and their share of what the GPUs could do.",
                "short",
                {
                    "FLOPs a second": f"sum(rate(cocoa_train_model_flops_total{{{_RUN}}}{_RATE}))",
                    "MFU": f"max(cocoa_train_mfu_ratio{{{_RUN}}})",
                },
                log_scale=True,
                width=6,
            ),
            Panel(
                "Compiled graphs",
                "Flat after the first steps; stopped: layers run without torch.compile again.",
                "short",
                {
                    "graphs": f"max(cocoa_train_compiled_graphs{{{_RUN}}})",
                    "stopped": f"max(cocoa_train_compile_stopped{{{_RUN}}})",
                },
                width=6,
            ),
        ),
        "Where the time went": (
            Panel(
                "Share of the wall time by cause",
                "Since the submission; docs/metrics.md says what each cause is.",
                "percentunit",
                {"{{cause}}": f"run_id_cause:cocoa_run_seconds:share{{{_RUN}}}"},
                look=Look.BARS,
            ),
            Panel(
                "Wall time by cause",
                "Adds up to the time since the submission.",
                "s",
                {"{{cause}}": f"max by (cause) (cocoa_run_seconds{{{_RUN}}})"},
                look=Look.STACK,
            ),
            number(
                "Goodput",
                "Productive share since the submission.",
                "percentunit",
                f"max(cocoa_run_goodput_ratio{{{_RUN}}})",
                limit=0.85,
                low_is_bad=True,
            ),
            number("Wall time", "Since submission.", "s", f"max(cocoa_run_wall_seconds{{{_RUN}}})"),
            number(
                "Steps done again",
                "After resumes: work that no checkpoint had.",
                "none",
                f"max(cocoa_run_replayed_steps_total{{{_RUN}}})",
            ),
            number(
                "Crashes in a row",
                "Without a new checkpoint. At 3 the launcher gives up.",
                "none",
                f"max(cocoa_run_failed_attempts{{{_RUN}}})",
                limit=2,
            ),
            Panel(
                "Restarts",
                "By how the incarnation before had ended.",
                "none",
                {"{{reason}}": f"max by (reason) (cocoa_run_restarts_total{{{_RUN}}})"},
                look=Look.BARS,
            ),
        ),
        "Checkpoints": (
            Panel(
                "Steps that are in no checkpoint",
                "Three times the planned distance is a page.",
                "none",
                {
                    "steps": f"max(cocoa_train_step{{{_RUN}}}) - "
                    f"max(cocoa_checkpoint_last_success_step{{{_RUN}}})",
                    "planned distance": f"max(cocoa_checkpoint_every_steps{{{_RUN}}})",
                },
            ),
            Panel(
                "Age of the newest checkpoint",
                "Of the stage at work.",
                "s",
                {"": f"time() - max(cocoa_checkpoint_last_success_timestamp_seconds{{{_RUN}}})"},
            ),
            Panel(
                "Time of a save",
                "From the copy to the rename.",
                "s",
                {
                    "median": "histogram_quantile(0.5, sum by (le) "
                    f"(increase(cocoa_checkpoint_save_seconds_bucket{{{_RUN}}}[1h])))",
                    "95 %": "histogram_quantile(0.95, sum by (le) "
                    f"(increase(cocoa_checkpoint_save_seconds_bucket{{{_RUN}}}[1h])))",
                },
            ),
            Panel(
                "Share of time that training stands still for saves",
                "Over an hour.",
                "percentunit",
                {"": f"run_id:cocoa_checkpoint_blocked:ratio1h{{{_RUN}}}"},
            ),
            Panel(
                "Saves that failed, and saves that waited for the one before",
                "Waiting means that saves take longer than the distance between two.",
                "none",
                {
                    "failed in the last hour": "sum(increase"
                    f"(cocoa_checkpoint_failures_total{{{_RUN}}}[1h]))",
                    "waited": f"max(cocoa_checkpoint_waits{{{_RUN}}})",
                },
            ),
            number(
                "Size of a checkpoint",
                "Of the newest that this incarnation committed.",
                "bytes",
                f"max(cocoa_checkpoint_bytes{{{_RUN}}})",
            ),
            number(
                "Monitoring faults",
                "What of the monitoring does not work: ports, target files, diary, run files.",
                "none",
                f"sum(cocoa_exporter_faults_total{{{_RUN}}}) + "
                f"sum(cocoa_exporter_dropped_values_total{{{_RUN}}})",
                limit=1,
            ),
        ),
    },
)

BOARDS = {"fleet": FLEET, "run": RUN, "data": DATA, "learning": LEARNING}
