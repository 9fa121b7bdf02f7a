"""A real Prometheus and Alertmanager, as shipped, on the login node of a cluster that trains.

Configuration, rules and routing are ops/prometheus with the addresses of the test put in; no time
in them is shortened. Prometheus finds the ranks by the files they write, by the names of their
nodes; what it has to say goes through Alertmanager to a pager and a ticket system of the test.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import REQUEUE_HOLD
from live_prometheus import AS_SHIPPED, Prometheus, filled, missing_servers
from site_run import STAGES, Site

from cocoa_dist.config import load_resolved
from launcher.ledger import read_ledger

pytestmark = pytest.mark.slurm
PACED = Path(__file__).with_name("paced_trainer.py")
PAUSE = "0.25"  # seconds between two steps
HELD = 4.0  # seconds in the queue before the first start
LIMIT = 120.0  # seconds, on a busy machine
UP = 'up{job="cocoa"} == 1'
EVERYBODY = {"run/r0", "run/r1", "run/launcher"}
PENDING = 'ALERTS{alertstate=~"pending|firing"}'


class Watch:
    """A run of two ranks on two nodes, and the servers that look at it."""

    def __init__(self, site: Site, prometheus: Prometheus) -> None:
        self.site, self.prometheus = site, prometheus

    @property
    def targets(self) -> Path:
        return self.site.folder / "targets"

    def submit(self, *words: str, steps: int, every: int, options: tuple[str, ...] = ()) -> str:
        """Submit the first stage of `debug`."""
        self.site.write_recipe(first=steps, every=every)
        command = (str(PACED), PAUSE)
        self.site.write_cluster_file(trainer=command, DS_ACCELERATOR="cpu")
        fixed = (
            f"until={STAGES[0]}",
            f"metrics.targets={self.targets}",
            "metrics.log_every_steps=1",
        )
        return self.site.submit(*options, tasks=1, words=(*fixed, *words))

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = LIMIT) -> float:
        return self.site.wait(lambda: bool(condition()), what, seconds=seconds)

    def sees(self, expression: str) -> bool:
        return bool(self.prometheus.ask(expression))

    def wait_until_scraped(self, what: str) -> None:
        """From the last target file to all targets answering; at most 10 s."""
        self.wait(lambda: len(list(self.targets.iterdir())) == len(EVERYBODY), f"{what}: files")
        answering = lambda: self.prometheus.names(UP, "instance") == EVERYBODY  # noqa: E731
        took = self.wait(answering, f"{what}: file to scrape", seconds=30)
        assert took < 10.0

    def wait_until_gone(self) -> None:
        """Targets vanish, and with them whatever might still become an alert."""
        self.wait(lambda: not self.sees('up{job="cocoa"}'), "end to no target", seconds=30)
        assert list(self.targets.iterdir()) == []

    def assert_sent(self, *, pages: set[str], tickets: set[str]) -> None:
        """Exactly these came, each to the receiver of its severity, and said whose it is."""
        receiver = self.prometheus.receiver
        assert receiver.paged() == pages, receiver.got
        assert {name for path, name, _ in receiver.got if path == "/ticket"} == tickets
        for path, labels in receiver.alerts:
            assert path == f"/{labels['severity']}"
            assert labels["run_id"] == "run"


@pytest.fixture
def watch(site: Site, tmp_path: Path) -> Iterator[Watch]:
    if reason := missing_servers():
        pytest.skip(reason)
    for name in ("targets", "servers"):
        (tmp_path / name).mkdir()
    server = Prometheus(
        tmp_path / "servers",
        targets=tmp_path / "targets",
        settings=AS_SHIPPED,
        place=site.cluster.login_place(),
    )
    try:
        yield Watch(site, server)
    finally:
        server.stop()


def test_a_requeue_pages_nobody_and_a_stopped_rank_does_within_two_minutes(watch: Watch) -> None:
    site, prometheus = watch.site, watch.prometheus
    submitted = time.time()
    job = watch.submit(steps=2000, every=20, options=("--hold",))
    time.sleep(HELD)
    site.cluster.login("scontrol", "release", job)
    watch.wait_until_scraped("first start")
    watch.wait(
        lambda: watch.sees('cocoa_run_info{restart="0"} and on () cocoa_train_step > 3'), "steps"
    )
    nodes = prometheus.names('up{job="cocoa",rank!=""}', "node")
    assert len(nodes) == 2
    assert prometheus.names('up{job="cocoa"}', "slurm_job_id") == {job}

    high = site.occupy()
    watch.wait(lambda: site.state(high) == "RUNNING", "nodes released")
    watch.wait(lambda: site.restarts(job) == 1, "requeue")
    assert list(watch.targets.iterdir()) == []
    watch.wait_until_scraped("second start")
    watch.wait(lambda: watch.sees('cocoa_run_info{restart="1"}'), "new restart label")
    watch.wait(lambda: watch.sees("cocoa_train_stepping == 1"), "steps after the requeue")
    watch.wait(
        lambda: watch.sees('cocoa_run_restarts_total{reason="preempted"} == 1'), "restart counted"
    )
    assert prometheus.names("count_over_time(cocoa_run_info[10m])", "restart") == {"0", "1"}
    watch.assert_sent(pages=set(), tickets=set())

    stopped = stop_a_rank(watch)
    began = time.monotonic()
    try:
        paged = ("/page", "TrainingStalled", "firing")
        watch.wait(lambda: paged in prometheus.receiver.got, "hang to page", seconds=180)
        assert time.monotonic() - began < 120.0
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    hung = time.monotonic() - began
    watch.wait(lambda: "TrainingStalled" not in prometheus.firing(), "page taken back")
    site.cluster.login("scancel", job)
    site.wait_for_end(job)
    assert_ledger(site, submitted=submitted, hung=hung)
    watch.wait_until_gone()
    watch.assert_sent(pages={"TrainingStalled"}, tickets=set())
    sys.stderr.write(f"\n  {'; '.join(site.times)}\n")


def assert_ledger(site: Site, *, submitted: float, hung: float) -> None:
    """The ledger says what was done: held twice, stopped once, and nothing lost."""
    config, now = load_resolved(site.run_dir / "resolved.yaml"), time.time()
    ledger = read_ledger(site.run_dir, config, now=now, live=False)
    wall = now - submitted
    assert ledger.wall_seconds == pytest.approx(wall, abs=max(0.01 * wall, 1.5))  # SLURM: whole s
    assert sum(ledger.seconds.values()) == ledger.wall_seconds
    assert ledger.seconds["unknown"] < 0.02 * wall
    assert ledger.seconds["hang"] == pytest.approx(hung, abs=3.0)
    assert ledger.seconds["replay"] < 3.0
    assert HELD + REQUEUE_HOLD - 1 < ledger.seconds["queue"] < HELD + REQUEUE_HOLD + 15
    shares = ", ".join(f"{cause} {spent:.1f}" for cause, spent in ledger.seconds.items() if spent)
    site.times.append(f"ledger of {wall:.1f} s: {shares}")


def stop_a_rank(watch: Watch) -> list[int]:
    """Send SIGSTOP to the rank of a node that is not the launcher's; its processes."""
    (series,) = watch.prometheus.ask('up{job="cocoa",rank="1"}')
    node = series["metric"]["node"]
    found = watch.site.cluster.processes(node, PACED.name)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


def test_a_full_disk_pages_and_the_normal_end_that_follows_does_not(watch: Watch) -> None:
    site, prometheus = watch.site, watch.prometheus
    disk = site.cluster.small_disk / "checkpoints"
    site.cluster.from_outside(disk).mkdir()
    job = watch.submit("checkpoint.max_failed_saves=1000", steps=120, every=5)
    watch.wait((site.run_dir / "resolved.yaml").exists, "run folder")
    (site.run_dir / "checkpoints").symlink_to(disk)  # the ranks still import
    watch.wait_until_scraped("start")
    watch.wait(lambda: watch.sees("cocoa_checkpoint_last_success_step > 0"), "first save")
    with filled(site.cluster.from_outside(site.cluster.small_disk)):
        failing = ("/page", "CheckpointFailing", "firing")
        watch.wait(lambda: failing in prometheus.receiver.got, "full disk to page")
        (before,) = prometheus.ask("cocoa_checkpoint_last_success_step")
    later = f"cocoa_checkpoint_last_success_step > {before['value'][1]}"
    watch.wait(lambda: watch.sees(later), "room to next save")
    assert site.wait_for_end(job, seconds=LIMIT) == "COMPLETED", site.output()
    watch.wait_until_gone()
    # A normal end leaves nothing that could page later; what has fired looks back over an hour.
    watch.wait(
        lambda: prometheus.names(PENDING, "alertname") <= {"CheckpointFailing"},
        "nothing pending",
        seconds=40,
    )
    watch.assert_sent(pages={"CheckpointFailing"}, tickets=set())
    sys.stderr.write(f"\n  {'; '.join(site.times)}\n")
