"""Real Prometheus and Alertmanager with our configuration, against a real run of two ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_prometheus import Prometheus, end, filled, launch, wait


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
        assert prometheus.receiver.paged() == pages
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
            with filled(tmp_path / "disk"):
                failing = ("/page", "CheckpointFailing", "firing")
                wait(lambda: failing in prometheus.receiver.got, "a full disk pages nobody")
                before = prometheus.ask("cocoa_checkpoint_last_success_step")[0]["value"][1]
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
