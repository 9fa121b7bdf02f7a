"""Real Prometheus and Alertmanager with our configuration, against a real run of two ranks."""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import free_port

OPS = Path(__file__).parents[2] / "ops" / "prometheus"


class Receiver:
    """What the pager and the ticket system would get: (path, alert, firing or resolved)."""

    def __init__(self) -> None:
        got = self.got = set[tuple[str, str, str]]()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in body["alerts"]:
                    got.add((self.path, alert["labels"]["alertname"], alert["status"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def start_alertmanager(
    folder: Path, *, receiver: Receiver
) -> tuple["subprocess.Popen[bytes]", int]:
    """Alertmanager with our example; only addresses and waits are other ones."""
    text = (OPS / "alertmanager.yml").read_text()
    text = text.replace("localhost:9095", f"127.0.0.1:{receiver.server.server_port}")
    text = text.replace("group_wait: 10s", "group_wait: 0s")
    text = text.replace("group_interval: 5m", "group_interval: 1s")
    (folder / "alertmanager.yml").write_text(text)
    port = free_port()
    command = ["prometheus-alertmanager", f"--config.file={folder}/alertmanager.yml"]
    command += [f"--storage.path={folder}/am", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "alertmanager.log").open("w") as log:
        return subprocess.Popen(
            [*command, "--cluster.listen-address="], stdout=log, stderr=log
        ), port


class Prometheus:
    """One server of this test; scrapes every second."""

    def __init__(self, folder: Path, *, targets: Path) -> None:
        self.receiver = Receiver()
        self.alertmanager, pager = start_alertmanager(folder, receiver=self.receiver)
        config = yaml.safe_load((OPS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [f"{targets}/*.json"]
        where = config["alerting"]["alertmanagers"][0]["static_configs"][0]
        where["targets"] = [f"127.0.0.1:{pager}"]
        # The rules as they are, but a hang takes 4 s instead of 75.
        rules = (OPS / "rules.yml").read_text()
        rules = rules.replace(", 60)", ", 3)").replace("for: 15s", "for: 1s")
        (folder / "rules.yml").write_text(rules)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.port = free_port()
        command = [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> None:
        for process in (self.process, self.alertmanager):
            process.terminate()
            process.wait(timeout=30)
        self.receiver.stop()

    def ask(self, expression: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"query": expression})
        address = f"http://127.0.0.1:{self.port}/api/v1/query?{query}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return result
        except OSError:
            return []  # not up yet

    def names(self, expression: str, label: str) -> set[str]:
        return {series["metric"].get(label, "") for series in self.ask(expression)}

    def firing(self) -> set[str]:
        return self.names('ALERTS{alertstate="firing"}', "alertname")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    for name in ("prometheus", "prometheus-alertmanager"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (apt-get install {name})")
    server = Prometheus(tmp_path, targets=tmp_path / "targets")
    yield server
    server.stop()


def wait(condition: Callable[[], object], what: str, *, seconds: float = 90.0) -> float:
    """Wait until something holds; returns after how many seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.2)
    return time.monotonic() - began


def launch(tmp_path: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "launcher", "run", "debug"]
    command += ["--run-dir", str(tmp_path / "run"), f"metrics.targets={tmp_path / 'targets'}"]
    command += ["stages.joint_reconstruction.steps=2000", "checkpoint.every_steps=20", *overrides]
    environment = {name: text for name, text in os.environ.items() if name != "SLURM_JOB_ID"}
    with (tmp_path / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def rank_process(run_dir: Path, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ours = b"cocoa_dist.train" in command and str(run_dir).encode() in command
        if ours and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_targets_come_and_go_a_stopped_rank_pages_and_a_preemption_does_not(
    tmp_path: Path, prometheus: Prometheus
) -> None:
    up = 'up{job="cocoa"} == 1'
    everybody = {"run/r0", "run/r1", "run/launcher"}
    (tmp_path / "targets").mkdir()
    launcher = launch(tmp_path)
    try:
        wait(lambda: len(list((tmp_path / "targets").iterdir())) == 3, "no target files")
        found = wait(lambda: prometheus.names(up, "instance") == everybody, "not scraped")
        wait(lambda: prometheus.ask("cocoa_train_stepping == 1"), "no second step")
        wait(lambda: prometheus.ask("run_id:cocoa_train_step_seconds:median > 0"), "no recording")
        stopped = rank_process(tmp_path / "run", 1)
        os.kill(stopped, signal.SIGSTOP)
        stalled = ("/page", "TrainingStalled", "firing")
        paged = wait(lambda: stalled in prometheus.receiver.got, "a hang pages nobody")
        os.kill(stopped, signal.SIGCONT)
        wait(lambda: "TrainingStalled" not in prometheus.firing(), "the page does not go away")
        fired_before = prometheus.firing()

        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
        assert list((tmp_path / "targets").iterdir()) == []
        gone = wait(lambda: not prometheus.ask('up{job="cocoa"}'), "targets do not vanish")
        launcher = launch(tmp_path)
        wait(lambda: prometheus.names(up, "instance") == everybody, "not found again")
        wait(lambda: prometheus.ask("cocoa_train_stepping == 1"), "no step after the preemption")
        restarted = 'cocoa_run_restarts_total{reason="preempted"} == 1'
        wait(lambda: prometheus.ask(restarted), "the restart is not counted", seconds=10)
        assert len(prometheus.ask("count_over_time(cocoa_run_info[10m])")) == 2  # two epochs
        assert prometheus.firing() <= fired_before
        pages = prometheus.names(
            'count_over_time(ALERTS{alertstate="firing",severity="page"}[10m])', "alertname"
        )
        assert pages == {"TrainingStalled"}
        assert {name for path, name, _ in prometheus.receiver.got if path == "/page"} == pages
    finally:
        end(launcher)
    sys.stdout.write(f"target file to scrape {found:.1f} s, hang to page {paged:.1f} s, ")
    sys.stdout.write(f"end to stale {gone:.1f} s\n")


@pytest.mark.slow
def test_a_full_disk_pages_and_the_page_goes_when_there_is_room(
    tmp_path: Path, prometheus: Prometheus
) -> None:
    disk = tmp_path / "run" / "checkpoints"
    (tmp_path / "targets").mkdir()
    with small_disk(tmp_path / "disk"):
        launcher = launch(tmp_path, "checkpoint.max_failed_saves=1000")
        try:
            wait((tmp_path / "run").exists, "no run folder")
            disk.symlink_to(tmp_path / "disk")
            wait(lambda: prometheus.ask("cocoa_checkpoint_last_success_step > 0"), "no save")
            ballast = tmp_path / "disk" / "ballast"
            fill(ballast)
            failing = ("/page", "CheckpointFailing", "firing")
            wait(lambda: failing in prometheus.receiver.got, "a full disk pages nobody")
            before = prometheus.ask("cocoa_checkpoint_last_success_step")[0]["value"][1]
            ballast.unlink()
            later = f"cocoa_checkpoint_last_success_step > {before}"
            wait(lambda: prometheus.ask(later), "no save after there was room")
        finally:
            end(launcher)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 100 MB, which only root can make."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
                file.flush()
        except OSError:
            pass


def end(launcher: "subprocess.Popen[bytes]") -> None:
    launcher.send_signal(signal.SIGTERM)
    try:
        launcher.wait(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
