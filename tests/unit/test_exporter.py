"""The endpoint of a process: what it serves, how it is found, and what happens if it cannot."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cocoa_dist.config import MetricsConfig
from cocoa_dist.exporter import (
    Exporter,
    Values,
    addresses,
    collect_stale_targets,
    target_folder,
    target_labels,
    target_name,
)
from cocoa_dist.metrics import METRICS, Source

FAULTS = "cocoa_exporter_faults_total"


@pytest.fixture
def values() -> Values:
    return Values(Source.EVERY_RANK, Source.RANK_0, strict=True)


def test_a_strict_process_refuses_a_name_where_it_is_given(values: Values) -> None:
    with pytest.raises(ValueError, match="the registry has no such metric"):
        values.later("step", lambda: values.set("cocoa_nowhere", 1.0))


def start(values: Values, folder: Path, *, port: int = 0, name: str = "a.json") -> Exporter:
    exporter = Exporter(values)
    exporter.start(MetricsConfig(), port=port, folder=folder, name=name, labels={"run_id": "x"})
    return exporter


def scrape(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_a_scrape_gives_what_was_set_and_nothing_else(values, tmp_path):
    values.set("cocoa_train_step", 7)
    values.add("cocoa_train_tokens_total", 100)
    values.add("cocoa_train_tokens_total", 50)
    values.set("cocoa_train_loss", 2.5, name="text")
    for seconds in (0.04, 0.3, 1000.0):
        values.observe("cocoa_train_step_seconds", seconds)
    exporter = start(values, tmp_path)
    text = scrape(exporter.port)
    exporter.stop()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert "cocoa_train_step 7.0" in lines
    assert "cocoa_train_tokens_total 150.0" in lines
    assert 'cocoa_train_loss{name="text"} 2.5' in lines
    assert 'cocoa_train_step_seconds_bucket{le="0.05"} 1.0' in lines
    assert 'cocoa_train_step_seconds_bucket{le="0.5"} 2.0' in lines
    assert 'cocoa_train_step_seconds_bucket{le="+Inf"} 3.0' in lines
    assert "cocoa_train_step_seconds_count 3.0" in lines
    assert not any(word in text for word in ("_created", "python_gc", "python_info"))
    assert "cocoa_train_grad_norm" not in text  # never set: absent, not 0


def test_memory_and_cpu_are_read_at_the_scrape(values, tmp_path):
    exporter = start(values, tmp_path)
    text = scrape(exporter.port)
    exporter.stop()
    found = dict(line.split() for line in text.splitlines() if line.startswith("cocoa_process"))
    assert 10e6 < float(found["cocoa_process_resident_bytes"]) < 100e9
    assert 0.0 < float(found["cocoa_process_cpu_seconds_total"]) <= sum(os.times()[:2]) + 1.0


def test_the_target_names_the_endpoint_and_goes_at_the_end(values, tmp_path):
    exporter = start(values, tmp_path / "not" / "there")
    path = tmp_path / "not" / "there" / "a.json"
    target = json.loads(path.read_text())
    assert target == [{"targets": [f"127.0.0.1:{exporter.port}"], "labels": {"run_id": "x"}}]
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    exporter.stop()
    assert not path.exists()
    with pytest.raises(OSError, match="refused"):
        scrape(exporter.port)


def test_the_target_goes_when_the_process_ends_by_an_exception(tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from cocoa_dist.config import MetricsConfig; from cocoa_dist.exporter import *\n"
        "exporter = Exporter(Values())\n"
        "folder = Path(sys.argv[2])\n"
        "exporter.start(MetricsConfig(), port=0, folder=folder, name='a.json', labels={})\n"
        "assert (folder / 'a.json').exists() and 'torch' not in sys.modules\n"
        "raise RuntimeError('boom')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), str(tmp_path)], capture_output=True, text=True
    )
    assert "boom" in done.stderr
    assert "AssertionError" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_told_once_and_counted(values, tmp_path, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        exporter = start(values, tmp_path, port=taken.getsockname()[1])
    assert exporter.port is None
    assert values.get(FAULTS, reason="port") == 1.0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot listen on 127.0.0.1" in caplog.text
    assert list(tmp_path.iterdir()) == []  # nothing is announced
    exporter.stop()


@pytest.mark.parametrize("kind", ["file", "read_only", "full"])
def test_a_folder_that_cannot_be_written_costs_the_target_only(
    values, tmp_path, caplog, monkeypatch, kind
):
    folder = tmp_path / "sd"
    if kind == "file":
        folder.write_text("not a folder")
    elif kind == "read_only":
        folder.mkdir()
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.access(folder, os.W_OK):  # root may write anywhere
            monkeypatch.setattr("cocoa_dist.exporter.write_atomic", refuse(13, "read-only"))
    else:
        monkeypatch.setattr("cocoa_dist.exporter.write_atomic", refuse(28, "no space left"))
    exporter = start(values, folder)
    assert exporter.target is None
    assert f'{FAULTS}{{reason="target"}} 1.0' in scrape(exporter.port)
    assert len(caplog.records) == 1
    exporter.stop()


def refuse(number: int, text: str):
    def write(path: Path, data: bytes) -> None:
        raise OSError(number, text, str(path))

    return write


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("cocoa_train_lost", {}, "the registry has no such metric"),
        ("cocoa_train_loss", {}, r"its labels are \['name'\], found \[\]"),
        ("cocoa_run_wall_seconds", {}, "it is exported by launcher, this process is every rank"),
    ],
)
def test_what_is_not_declared_raises_under_tests(values, name, labels, message):
    with pytest.raises(ValueError, match=message):
        values.set(name, 1.0, **labels)


def test_what_is_not_declared_is_dropped_with_one_warning_in_production(caplog):
    values = Values(Source.EVERY_RANK, strict=False)
    for _ in range(3):
        values.set("cocoa_train_lost", 1.0)
    values.set("cocoa_train_loss", 1.0, name="x")
    assert values.get("cocoa_exporter_dropped_values_total") == 4.0
    assert len(caplog.records) == 2
    assert not [f for f in values.collect() if f.name == "cocoa_train_lost"]


def test_a_label_takes_no_more_values_than_declared(values):
    most = METRICS["cocoa_train_loss"].most_series
    for number in range(most):
        values.set("cocoa_train_loss", 1.0, name=str(number))
    values.set("cocoa_train_loss", 2.0, name="0")
    with pytest.raises(ValueError, match=f"{most} series already"):
        values.set("cocoa_train_loss", 1.0, name="one more")


def test_strictness_comes_from_the_environment(monkeypatch):
    with pytest.raises(ValueError, match="no such metric"):
        Values(Source.EVERY_RANK).set("cocoa_train_lost", 1.0)
    monkeypatch.delenv("COCOA_STRICT_METRICS")
    Values(Source.EVERY_RANK).set("cocoa_train_lost", 1.0)


def test_outside_a_job_only_this_machine_can_connect(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert addresses("auto") == ("127.0.0.1", "127.0.0.1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert addresses("auto") == ("0.0.0.0", socket.gethostname())
    assert addresses("10.0.0.3") == ("10.0.0.3", "10.0.0.3")


def test_stale_targets_of_this_run_are_collected_and_others_left(tmp_path):
    mine, other, folder = tmp_path / "mine", tmp_path / "other", tmp_path / "sd"
    folder.mkdir()
    names = {
        key: target_name(run, epoch=epoch, who=who)
        for key, run, epoch, who in (
            ("dead", mine, "7.0-1", "r00000"),
            ("now", mine, "7.1-1", "r00000"),
            ("launcher", mine, "run", "launcher-n1-5"),
            ("other", other, "7.0-1", "r00000"),
        )
    }
    for name in names.values():
        (folder / name).write_text("[]")
    assert collect_stale_targets(folder, mine, epoch="7.0-1") == [names["dead"]]
    assert collect_stale_targets(folder, mine) == sorted([names["now"], names["launcher"]])
    assert [path.name for path in folder.iterdir()] == [names["other"]]
    assert collect_stale_targets(tmp_path / "missing", mine) == []


def test_the_identity_of_a_target_does_not_depend_on_where_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    labels = target_labels(tmp_path / "big", who="r3", stage="contrastive", rank="3")
    assert labels["instance"] == "big/r3"
    assert (labels["run_id"], labels["slurm_job_id"], labels["rank"]) == ("big", "42", "3")
    assert target_folder(tmp_path, MetricsConfig()) == tmp_path / "sd"
    assert target_folder(tmp_path, MetricsConfig(targets="/shared")) == Path("/shared")


def test_a_forked_child_does_not_take_the_target_away(values, tmp_path):
    exporter = start(values, tmp_path)
    exporter._owner = -1  # as the child sees it
    exporter.stop()
    assert (tmp_path / "a.json").exists()
    exporter._owner = os.getpid()
    exporter.stop()


def test_a_client_that_says_nothing_does_not_keep_others_waiting(values, tmp_path):
    exporter = start(values, tmp_path)
    with socket.create_connection(("127.0.0.1", exporter.port)):
        began = time.monotonic()
        assert FAULTS in scrape(exporter.port)
        assert time.monotonic() - began < 1.0
    exporter.stop()
