"""The registry of metrics: names, cardinality, and what is made from it."""

import re
import sys
import time
from pathlib import Path

import pytest

from cocoa_dist.config import load_recipe
from cocoa_dist.events import EVENTS_NAME
from cocoa_dist.exporter import Values
from cocoa_dist.manifest import Manifest, write_manifest
from cocoa_dist.metrics import CAUSES, METRICS, PHASES, TIMED, Kind, Source, count_series
from cocoa_dist.monitor import Monitor

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import build_metric_docs

RECORD = {
    "stage": "contrastive",
    "step": 3,
    "epoch": "7.1-1",
    "time": 1.0,
    "loss": 2.5,
    "loss/text": 2.0,
    "token_accuracy": 0.4,
    "asked_token_ratio": 0.3,
    "hidden_patch_ratio": 0.5,
    "alignment": 1.2,
    "uniformity": -2.0,
    "effective_rank": 7.5,
    "false_negative_ratio": 0.01,
    "temperature": 0.05,
    "token_similarity": 0.3,
    "grad_norm/vision": 0.5,
    "grad_norm/text": None,
    "update_ratio/vision": 1e-3,
    "held_out_recall/unseen": 0.4,
    "held_out_tied/unseen": 0.0,
    "model_flops": 1e9,
    "mfu": 0.4,
    "compiled_graphs": 14,
    "compile_stopped": False,
    "missing_negative_ratio": 0.1,
    "hidden_negative_ratio": 0.02,
    "similarity_bias": -9.0,
    "grad_norm": None,
    "learning_rate": 1e-3,
    "samples": 24,
    "tokens": 480,
    "fill_ratio": 0.9,
    "data_wait_seconds": 0.1,
    "step_seconds": 0.7,
    "cpu_seconds": 1.5,
    "truncated_texts": 1,
    "shrunk_pictures": 12,
    "loader_restarts": 1,
    "skipped": True,
    "loss_deviations": None,
    "loss_spike": False,
    "batch_digest": "ab",
    "checkpoint_blocked_seconds": 0.2,
    "checkpoint_seconds": 4.0,
    "saves_waited": 2,
}
NOT_EXPORTED = {"stage", "epoch", "time", "batch_digest"}


def test_a_run_of_1024_ranks_stays_below_60_000_series() -> None:
    assert 1024 * 10 < count_series(world_size=1024) <= 60_000


def test_a_histogram_counts_with_every_bucket() -> None:
    for metric in METRICS.values():
        if metric.buckets:
            values = Values(Source.RANK_0)
            values.observe(metric.name, 1.0)
            (family,) = values.collect()
            assert metric.most_series == len(family.samples) == len(metric.buckets) + 3


def test_the_series_of_a_rank_are_counted_by_hand_once() -> None:
    # 8 plain ones, 3 kinds of GPU memory, one for each of 6 timed phases, 5 reasons of faults,
    # dropped values, and the 5 that Prometheus adds
    one_more = count_series(world_size=11) - count_series(world_size=10)
    assert one_more == 8 + 3 + len(TIMED) + 5 + 1 + 5


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_follow_the_rules_of_prometheus(metric) -> None:
    assert re.fullmatch(
        r"cocoa_(run|stage|train|data|checkpoint|evaluation|process|gpu|exporter)_[a-z_]+",
        metric.name,
    )
    assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total")
    assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(".")
    assert not {"le", "instance", "job", "run_id", "rank", "node"} & set(metric.labels)
    if "seconds" in metric.unit:
        assert "_seconds" in metric.name


def test_histograms_are_not_exported_by_every_rank() -> None:
    wide = [m.name for m in METRICS.values() if m.buckets and m.source is not Source.RANK_0]
    assert wide == []


def test_the_documentation_is_what_the_registry_says() -> None:
    assert build_metric_docs.DOCS.read_text() == build_metric_docs.render()


def make_monitor(run_dir: Path, *, rank: int = 0, **changes: object) -> Monitor:
    overrides = ["metrics.exporter=false", *(f"{k}={v}" for k, v in changes.items())]
    return Monitor.start(
        load_recipe("debug", overrides),
        "contrastive",
        run_dir=run_dir,
        rank=rank,
        world_size=2,
        epoch="7.1-1",
    )


def test_every_metric_of_the_ranks_is_really_set(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    monitor.resumed(None)
    with monitor.phase("train"):
        monitor.step(3, seconds=0.7, waited=0.1, bad_records=1)
        monitor.record({**RECORD, "loss_deviations": 1.0}, samples=72, tokens=1440)
        monitor.saved(put_manifest(tmp_path, step=2))
        monitor.gpu({"allocated": 1, "reserved": 2, "peak": 3}, retries=0)
    monitor.exporter.start(
        monitor.config.metrics, port=0, folder=tmp_path / "sd", name="a.json", labels={}
    )
    exported = {sample.name for family in monitor.values.collect() for sample in family.samples}
    monitor.stop()
    for metric in METRICS.values():
        if metric.source is not Source.LAUNCHER:
            suffix = "_count" if metric.buckets else ""
            assert metric.name + suffix in exported, metric.name


def test_every_field_of_the_record_is_exported_or_known_not_to_be() -> None:
    taken = {metric.record for metric in METRICS.values() if metric.record is not None}
    families = {name.partition("/")[0] + "/" for name in RECORD if "/" in name}
    plain = {name for name in RECORD if "/" not in name}
    assert plain - NOT_EXPORTED <= taken
    assert families <= taken | {"loss/"}
    assert taken <= plain | families


def test_a_family_of_fields_is_one_metric_with_a_label(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    monitor.record(RECORD, samples=24, tokens=480)
    seldom = ("grad_norm/", "update_ratio/", "held_out")
    later = {k: v for k, v in RECORD.items() if not k.startswith(seldom)}
    monitor.record(later, samples=48, tokens=960)  # a step that measures none
    monitor.stop()
    get = monitor.values.get
    assert get("cocoa_train_consumed_samples") == 48.0
    assert get("cocoa_train_loss", name="text") == 2.0
    assert get("cocoa_train_loss", name="loss") == 2.5
    assert get("cocoa_train_group_grad_norm", group="vision") == 0.5
    assert str(get("cocoa_train_group_grad_norm", group="text")) == "nan"
    assert get("cocoa_train_update_ratio", group="vision") == 1e-3
    assert get("cocoa_evaluation_recall_ratio", set="unseen") == 0.4


def test_a_run_on_cpus_says_nothing_of_gpus(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    record = {name: value for name, value in RECORD.items() if name != "mfu"}
    monitor.record(record, samples=24, tokens=480)
    exported = {family.name for family in monitor.values.collect()}
    monitor.stop()
    assert {m.name for m in METRICS.values() if m.needs_gpu} & exported == set()
    assert "cocoa_process_resident_bytes" in exported


def test_a_step_without_finite_numbers_is_exported_as_nan_and_counted(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    monitor.record({**RECORD, "loss": None}, samples=24, tokens=480)
    monitor.stop()
    assert str(monitor.values.get("cocoa_train_loss", name="loss")) == "nan"
    assert str(monitor.values.get("cocoa_train_grad_norm")) == "nan"
    assert monitor.values.get("cocoa_train_skipped_steps_total") == 1.0
    assert monitor.values.get("cocoa_checkpoint_waits") == 2.0


def test_stepping_is_off_until_the_first_step_and_during_saves(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, rank=1)
    stepping = []

    def look() -> None:
        stepping.append(monitor.values.get("cocoa_train_stepping"))

    look()
    with monitor.phase("train"):
        look()
        monitor.step(1, seconds=0.5, waited=0.0)
        look()
        with monitor.phase("checkpoint"):
            look()
        look()
    look()
    assert stepping == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_only_rank_0_writes_the_diary(tmp_path: Path) -> None:
    make_monitor(tmp_path, rank=1).stop()
    assert not (tmp_path / EVENTS_NAME).exists()
    make_monitor(tmp_path, rank=0).stop()
    assert (tmp_path / EVENTS_NAME).exists()


def test_a_full_disk_costs_the_diary_and_not_the_run(tmp_path: Path, caplog) -> None:
    monitor = make_monitor(tmp_path, **{"metrics.heartbeat_seconds": 0})
    assert monitor.events is not None
    monitor.events._lines.path = Path("/dev/full")
    monitor.events._lines.close()
    for step in (1, 2, 3):
        monitor.step(step, seconds=0.1, waited=0.0)
    assert monitor.values.get("cocoa_exporter_faults_total", reason="events") == 3.0
    assert len([r for r in caplog.records if "events.jsonl" in r.message]) == 1
    monitor.stop()


def test_a_resume_takes_step_and_time_of_the_checkpoint(tmp_path: Path) -> None:
    from cocoa_dist.manifest import read_manifest

    manifest = read_manifest(put_manifest(tmp_path, step=4))
    monitor = make_monitor(tmp_path)
    monitor.resumed(manifest)
    monitor.stop()
    assert monitor.values.get("cocoa_checkpoint_last_success_step") == 4.0
    when = monitor.values.get("cocoa_checkpoint_last_success_timestamp_seconds")
    assert when == manifest.created_at


def test_failed_saves_are_counted_from_zero(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    before = monitor.values.get("cocoa_checkpoint_failures_total")
    monitor.save_failed("no space left")
    monitor.stop()
    assert (before, monitor.values.get("cocoa_checkpoint_failures_total")) == (0.0, 1.0)
    assert '"kind": "save_failed"' in (tmp_path / EVENTS_NAME).read_text()


def test_a_step_costs_less_than_half_a_millisecond(tmp_path: Path) -> None:
    """0.5 % of the 0.1 CPU seconds that a rank of `debug` spends on a step."""
    monitor = make_monitor(tmp_path)
    before, steps = time.process_time(), 500
    with monitor.phase("train"):
        for step in range(1, steps + 1):
            monitor.step(step, seconds=0.1, waited=0.01)
            monitor.record(RECORD, samples=step, tokens=step)
    spent = time.process_time() - before
    monitor.stop()
    assert spent / steps < 0.5e-3


def test_phases_and_causes_fit_together() -> None:
    assert set(PHASES) - {"train"} <= set(CAUSES)
    assert set(TIMED) - {"step"} <= set(CAUSES)


def put_manifest(folder: Path, *, step: int) -> Path:
    fields = dict.fromkeys(("samples", "tokens", "skipped_steps"), 0)
    seconds = dict.fromkeys(("wall_seconds", "productive_seconds", "train_cpu_seconds"), 0.0)
    texts = dict.fromkeys(("run", "recipe_fingerprint", "epoch", "engine", "base_model"), "x")
    manifest = Manifest(
        stage="contrastive",
        step=step,
        target_step=8,
        complete=False,
        parent=None,
        world_size=2,
        versions={},
        data_state={},
        loss={},
        files=(),
        **fields,
        **seconds,
        **texts,
    )
    write_manifest(folder, manifest)
    return folder
