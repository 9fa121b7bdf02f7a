"""The real trainer on a real cluster: the recipe `debug`, three stages, disturbed and not.

Fewer scenarios than in test_slurm_scenarios.py, and one rank a node: each start of a stage imports
torch and DeepSpeed on every rank, which on two shared cores takes most of the time. That another
number of ranks goes on, and that a fenced rank can commit nothing, is in tests/distributed.
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
    assert site.wait_for_end(site.submit(tasks=1), seconds=LIMIT) == "COMPLETED", site.output()
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
    job = site.submit(tasks=1)
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
