"""A real Prometheus and Alertmanager with our configuration, and a run that they look at.

Shared by tests/distributed, where they run beside the ranks, and tests/slurm, where they run in the
network of the login node.
"""

import ctypes
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from launcher.backend_local import free_port

OPS = Path(__file__).parents[1] / "ops" / "prometheus"
PROGRAMS = {"prometheus": "prometheus", "prometheus-alertmanager": "prometheus-alertmanager"}
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
T = TypeVar("T")


def missing_servers() -> str:
    """Return why no Prometheus can be started here; "" if it can."""
    lacking = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    packages = " ".join(lacking)
    return f"not installed: {packages} (apt-get install {packages})" if lacking else ""


@dataclass(frozen=True)
class Place:
    """Where servers run: here, or in the network of a machine of a test cluster."""

    enter: tuple[str, ...] = ()  # what a command is put behind
    network: Path | None = None  # of a process of that machine: /proc/PID/ns/net

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in that network; sockets it opens stay in there."""
        if self.network is None:
            return function()
        with ThreadPoolExecutor(max_workers=1, initializer=self._go_there) as pool:
            return pool.submit(function).result()

    def start(self, *command: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start a server that dies with this process."""
        prctl = ctypes.CDLL(None).prctl
        with log.open("w") as out:
            return subprocess.Popen(
                [*self.enter, *command],
                stdout=out,
                stderr=out,
                preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0),
            )

    def _go_there(self) -> None:
        """Move this thread, and no other one, into the network."""
        assert self.network is not None
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(self.network, os.O_RDONLY)
        try:
            assert libc.setns(handle, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(handle)


class Receiver:
    """What the pager and the ticket system would get."""

    def __init__(self, place: Place) -> None:
        got = self.got = set[tuple[str, str, str]]()  # path, alert, firing or resolved
        alerts = self.alerts = list[tuple[str, dict[str, str]]]()  # path, labels; as they came

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for alert in body["alerts"]:
                    alerts.append((self.path, alert["labels"]))
                    got.add((self.path, alert["labels"]["alertname"], alert["status"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        make = http.server.ThreadingHTTPServer
        self.server = place.call(lambda: make(("127.0.0.1", 0), Handler))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def paged(self) -> set[str]:
        """Return the alerts that somebody was woken for."""
        return {name for path, name, _ in self.got if path == "/page"}

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass(frozen=True)
class Settings:
    """How the example configuration is changed for a test, addresses and folders aside."""

    scrape_seconds: float | None = None  # None: as the example has it; also between evaluations
    rules: tuple[tuple[str, str], ...] = ()  # words of the rules, and what they become
    alertmanager: tuple[tuple[str, str], ...] = ()


AS_SHIPPED = Settings()
# A hang is an alert after 4 s instead of 75, and nothing is held back.
QUICK = Settings(
    scrape_seconds=1.0,
    rules=((", 60)", ", 3)"), ("for: 15s", "for: 1s")),
    alertmanager=(
        ("group_wait: 10s", "group_wait: 0s"),
        ("group_interval: 5m", "group_interval: 1s"),
    ),
)


class Prometheus:
    """One Prometheus and one Alertmanager of this test, and what they send to whom."""

    def __init__(
        self, folder: Path, *, targets: Path, settings: Settings = QUICK, place: Place = Place()
    ) -> None:
        """`targets`: the folder of target files; `folder` is the servers' own."""
        self.place = place
        self.receiver = Receiver(place)
        self.alertmanager, pager = self._start_alertmanager(folder, settings)
        config = yaml.safe_load((OPS / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        if settings.scrape_seconds is not None:
            every = f"{settings.scrape_seconds:g}s"
            config["global"] = {"scrape_interval": every, "evaluation_interval": every}
            job.pop("scrape_interval", None)
            job.pop("scrape_timeout", None)
        job["file_sd_configs"][0]["files"] = [f"{targets}/*.json"]
        where = config["alerting"]["alertmanagers"][0]["static_configs"][0]
        where["targets"] = [f"127.0.0.1:{pager}"]
        rules = replaced((OPS / "rules.yml").read_text(), settings.rules)
        (folder / "rules.yml").write_text(rules)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.port = place.call(free_port)
        self.process = place.start(
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/tsdb",
            f"--web.listen-address=127.0.0.1:{self.port}",
            log=folder / "prometheus.log",
        )

    def _start_alertmanager(
        self, folder: Path, settings: Settings
    ) -> tuple["subprocess.Popen[bytes]", int]:
        receiver = ("localhost:9095", f"127.0.0.1:{self.receiver.server.server_port}")
        text = (OPS / "alertmanager.yml").read_text()
        text = replaced(text, (receiver, *settings.alertmanager))
        (folder / "alertmanager.yml").write_text(text)
        port = self.place.call(free_port)
        process = self.place.start(
            "prometheus-alertmanager",
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/am",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
            log=folder / "alertmanager.log",
        )
        return process, port

    def stop(self) -> None:
        for process in (self.process, self.alertmanager):
            process.terminate()
            process.wait(timeout=30)
        self.receiver.stop()

    def ask(self, expression: str) -> list[dict[str, Any]]:
        query = urllib.parse.urlencode({"query": expression})
        address = f"http://127.0.0.1:{self.port}/api/v1/query?{query}"
        try:
            text = self.place.call(lambda: _read(address))
        except OSError:
            return []  # not up yet
        result: list[dict[str, Any]] = json.loads(text)["data"]["result"]
        return result

    def names(self, expression: str, label: str) -> set[str]:
        return {series["metric"].get(label, "") for series in self.ask(expression)}

    def firing(self) -> set[str]:
        return self.names('ALERTS{alertstate="firing"}', "alertname")


def _read(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=10) as answer:
        text: bytes = answer.read()
        return text


def replaced(text: str, changes: tuple[tuple[str, str], ...]) -> str:
    """Make the changes; each must be there to be made."""
    for before, after in changes:
        assert before in text, f"'{before}' is not in the example any more"
        text = text.replace(before, after)
    return text


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


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Be entered while the file system of a folder is full."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
                file.flush()
        except OSError:
            pass
    try:
        yield
    finally:
        ballast.unlink()
