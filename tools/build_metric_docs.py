"""Write docs/metrics.md from the registry in cocoa_dist/registry/.

python tools/build_metric_docs.py            write the file
python tools/build_metric_docs.py --check    exit 1 if it is not what the registry says
"""

import argparse
import sys
from pathlib import Path

from cocoa_dist.metrics import CAUSES, METRICS, Metric, Source, count_series

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"
_HEAD = """\
# Metrics

Made by `python tools/build_metric_docs.py` from the registry in `cocoa_dist/registry/`; change it
there. Every rank and the launcher serve `/metrics` on a free port and write a target file for
Prometheus' `file_sd` into `sd/` of the run folder (`metrics.targets` names another folder). Targets
carry the labels `run_id`, `stage`, `rank`, `node`, `slurm_job_id` and an `instance` that stays the
same over restarts. A run of 1,024 ranks has at most {series:,} series in Prometheus.

`ops/prometheus/` holds an example configuration, rules with their tests, and an example for
Alertmanager, `ops/grafana/` dashboards that show every metric; [operators.md](operators.md) says
what to do when an alert comes.
"""
_TITLES = {
    Source.EVERY_RANK: "Every rank",
    Source.RANK_0: "Rank 0, for the whole run",
    Source.LAUNCHER: "The launcher, from the run folder",
    Source.EVERYBODY: "Every rank and the launcher, about monitoring itself",
}
_MEANINGS = {
    "productive": "inside steps whose result is in the final history, without waiting for data",
    "queue": "no launcher at work: after the submission (of the job) and between two of them",
    "start": "launcher and ranks starting and leaving, looking at inputs and nodes",
    "restore": "looking for a checkpoint, checking and loading it",
    "data_wait": "a step waiting for its data",
    "checkpoint": "training standing still for a save",
    "evaluation": "held-out evaluation inside the run",
    "replay": "inside steps that were lost and done again, or will have to be",
    "hang": "no step for more than a minute and 20 median steps, or until a watchdog ended it",
    "unknown": "between steps, outside all of these",
}


def render() -> str:
    """Return the page."""
    parts = [_HEAD.format(series=count_series(world_size=1024))]
    for source, title in _TITLES.items():
        parts.append(f"\n## {title}\n\n| metric | type | unit | labels | meaning |\n")
        parts.append("| --- | --- | --- | --- | --- |\n")
        parts += [_row(metric) for metric in METRICS.values() if metric.source is source]
    parts.append(
        "\n## Where the time goes\n\n`cocoa_run_seconds`, `launcher status` and `status --json` "
        "(`seconds`) put every second of\na run's wall time under one cause; they add up to "
        "`cocoa_run_wall_seconds`. Goodput is the\nproductive share. The source is `events.jsonl` "
        "in the run folder, which is never cut back.\n\n| cause | what it is |\n| --- | --- |\n"
    )
    parts += [f"| `{cause}` | {_MEANINGS[cause]} |\n" for cause in CAUSES]
    return "".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
    text = metric.help
    if metric.record is not None:
        text += f" `{metric.record}` in metrics.jsonl."
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {labels} | {text} |\n"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    if not arguments.check:
        DOCS.write_text(render(), encoding="utf-8")
        return 0
    if DOCS.is_file() and DOCS.read_text(encoding="utf-8") == render():
        return 0
    print(f"{DOCS} is not what the registry says: run python {sys.argv[0]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
