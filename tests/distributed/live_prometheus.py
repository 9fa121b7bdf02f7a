"""A real Prometheus and Alertmanager with our configuration, and a run that they look at."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def end(launcher: "subprocess.Popen[bytes]") -> None:
    launcher.send_signal(signal.SIGTERM)
    try:
        launcher.wait(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
