"""The real trainer on a real cluster: the recipe `debug`, three stages, disturbed and not.

Fewer scenarios than in test_slurm_scenarios.py: each start of a stage imports torch and DeepSpeed
on every rank, which on two shared cores takes most of the time.
"""

import sys
from pathlib import Path

import pytest
from site_run import STAGES, Site, assert_whole, history

pytestmark = pytest.mark.slurm
STEPS = 4
LIMIT = 400  # seconds, on a busy machine
FIRST, SECOND, LAST = STAGES


@pytest.fixture(scope="module")
def undisturbed(cluster, checkout, tmp_path_factory) -> Site:
    site = Site(cluster, checkout, tmp_path_factory.mktemp("trained"), Path(sys.executable))
    prepare(site)
    assert site.wait_for_end(site.submit(), seconds=LIMIT) == "COMPLETED", site.output()
    sys.stderr.write(f"\n  three stages undisturbed: {'; '.join(site.times)}\n")
    return site


def prepare(site: Site) -> None:
    site.write_recipe(steps=STEPS, every=2)
    site.write_cluster_file(steady=False, DS_ACCELERATOR="cpu")


def test_three_stages_train_on_two_nodes(undisturbed):
    site = undisturbed
    assert site.steps() == [(stage, step) for stage in STAGES for step in range(1, STEPS + 1)]
    assert_whole(site, history(site.run_dir))
    assert site.ends() == ["finished"] * 3


def test_preemption_and_the_loss_of_a_node_change_no_bit(undisturbed, site):
    prepare(site)
    job = site.submit()
    site.wait_for_step(FIRST, 2, seconds=LIMIT)
    high = site.occupy()
    site.wait(lambda: site.state(high) == "RUNNING", "nodes released", seconds=LIMIT)
    site.wait_for_step(SECOND, 1, seconds=LIMIT)
    node = site.cluster.job(job)["NodeList"].replace("[", "").partition("-")[0]
    site.cluster.cut_power(node)
    try:
        site.wait(lambda: site.restarts(job) == 2, f"requeue after the loss of {node}")
        assert site.wait_for_end(job, seconds=LIMIT) == "COMPLETED", site.output()
    finally:
        site.cluster.boot(node)
    assert_whole(site, history(undisturbed.run_dir))
    assert site.ends().count("crash") == 0


def test_ranks_on_a_node_that_was_cut_off_are_fenced(site):
    site.write_recipe(steps=4, every=2, first=2000)
    site.write_cluster_file(steady=False, DS_ACCELERATOR="cpu")
    job = site.submit(nodes=1, tasks=2)
    site.wait_for_step(FIRST, 2, seconds=LIMIT)
    node = site.batch_host(job)
    site.cluster.cut_network(node)  # the ranks live on, and they see the shared folder
    logs = site.run_dir / "logs"
    try:
        site.wait(lambda: "is fenced" in zombie_words(logs, job), "zombie refused", seconds=LIMIT)
        reached = site.steps()[-1][1]
        site.wait_for_step(FIRST, reached + 4, seconds=LIMIT)
        site.cluster.login("scancel", job)
        site.wait(lambda: site.state(job) == "CANCELLED", "end")
    finally:
        site.cluster.mend_network(node)
    site.wait(lambda: site.ranks() == [], "no zombie left")
    lines = site.metrics()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    epochs = [str(line["epoch"]).partition("-")[0] for line in lines]
    assert epochs == sorted(epochs)
    assert set(epochs) == {f"{job}.0", f"{job}.1"}


def zombie_words(logs: Path, job: str) -> str:
    return "".join(path.read_text() for path in logs.glob(f"{job}.0-*/*.log"))


def test_another_number_of_nodes_goes_on_from_the_last_checkpoint(undisturbed, site):
    prepare(site)
    job = site.submit()
    site.wait_for_step(FIRST, 2, seconds=LIMIT)
    site.cluster.login("scancel", job)
    site.wait_for_end(job, seconds=LIMIT)
    again = site.submit(nodes=3)
    assert site.wait_for_end(again, seconds=LIMIT) == "COMPLETED", site.output()
    assert site.steps() == [(stage, step) for stage in STAGES for step in range(1, STEPS + 1)]
    digests = [line[:3] for line in history(undisturbed.run_dir)]
    assert [line[:3] for line in history(site.run_dir)] == digests  # the same records, in order
    pairs = zip(history(undisturbed.run_dir), history(site.run_dir), strict=True)
    for before, after in pairs:
        assert abs(before[3] - after[3]) < 0.02 * abs(before[3])  # sums in another order
