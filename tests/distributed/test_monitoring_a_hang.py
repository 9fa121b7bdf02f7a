"""What Prometheus sees while ranks hang: answers at once, from every rank not stopped."""

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import free_port

from cocoa_dist.exporter import collect_stale_targets

WORKER = Path(__file__).with_name("waiting_rank.py")


@pytest.fixture
def load() -> Iterator[None]:
    """Keep every core of this machine busy."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_scrape_is_answered_while_the_main_thread_waits_for_ever(
    tmp_path: Path, load: None
) -> None:
    """In 50 ms, although nothing on this machine is idle."""
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment.pop("SLURM_JOB_ID", None)
        with (tmp_path / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(WORKER), str(tmp_path)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        targets = wait_for_targets(tmp_path / "sd", ranks=ranks)
        time.sleep(1.0)  # both are in the collective now
        for target in targets:
            spent, text = scrapes(target)
            assert "cocoa_train_stepping 1.0" in text
            assert statistics.median(spent) < 0.05, spent
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert len(collect_stale_targets(tmp_path / "sd", tmp_path)) == 2  # kill -9 leaves them
    assert list((tmp_path / "sd").iterdir()) == []


def wait_for_targets(folder: Path, *, ranks: list["subprocess.Popen[bytes]"]) -> list[str]:
    deadline = time.monotonic() + 120
    while len(found := list(folder.glob("*.json"))) < len(ranks):
        assert time.monotonic() < deadline
        assert [rank.poll() for rank in ranks] == [None, None]
        time.sleep(0.1)
    return [json.loads(path.read_text())[0]["targets"][0] for path in sorted(found)]


def scrapes(target: str) -> tuple[list[float], str]:
    """Seconds of ten scrapes, and the last answer."""
    spent, text = [], ""
    for _ in range(10):
        began = time.monotonic()
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        spent.append(time.monotonic() - began)
        time.sleep(0.2)
    sys.stdout.write(f"{target}: median {statistics.median(spent):.4f} s, {max(spent):.4f} s\n")
    return spent, text
