"""One SLURM cluster for the tests of this folder, one beside it, and runs submitted to them."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import NODES, Cluster, missing, wait_for
from site_run import CHECKOUT, History, Site, history

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the cluster where none can be had, with the reason."""
    needing = [item for item in items if item.get_closest_marker("slurm")]
    reason = missing() if needing else ""
    for item in needing:
        item.add_marker(pytest.mark.slow)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.up()
        yield made
    finally:
        made.down(keep_logs=bool(os.environ.get("COCOA_KEEP_SLURM")))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code under test, read-only and away from where anybody works on it."""
    root = tmp_path_factory.mktemp("checkout") / "cocoa"
    for part in ("cocoa_dist", "launcher", "ds_configs", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__", "*.tmp")
        shutil.copytree(CHECKOUT / part, root / part, ignore=ignored)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() or path.suffix == ".sh" else 0o444)
    return root


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A run of the steady trainer on two nodes of two ranks to which nothing happens."""
    made = Site(cluster, checkout, tmp_path_factory.mktemp("undisturbed"), Path(sys.executable))
    began = time.time()
    job = made.start(STEADY_STEP_SECONDS=0.02)
    assert made.wait_for_end(job) == "COMPLETED", made.output()
    first = float(str(made.metrics()[0]["time"])) - began
    made.times.append(f"sbatch to first step {first:.1f} s")
    assert first < 25
    return made


@pytest.fixture(scope="session")
def reference(undisturbed: Site) -> History:
    """Its losses: they do not depend on a run's folder, nor on the number of its ranks."""
    return history(undisturbed.run_dir)


@pytest.fixture(scope="session", autouse=True)
def beside(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[None]"]]:
    """The scenarios marked `aside`, one after the other on a cluster of their own."""
    functions = [getattr(item, "function", None) for item in request.session.items]
    scenarios = [vars(f)["scenario"] for f in functions if f and "scenario" in vars(f)]
    if not scenarios:
        yield {}
        return
    reference = request.getfixturevalue("reference")
    second = Cluster()

    def play(scenario: Callable[[Site, History], None]) -> None:
        site = Site(second, checkout, tmp_path_factory.mktemp("aside"), Path(sys.executable))
        with at_peace(site, name=scenario.__name__):
            scenario(site, reference)

    pool = ThreadPoolExecutor(max_workers=1)
    try:
        second.up()
        yield {scenario.__name__: pool.submit(play, scenario) for scenario in scenarios}
    finally:
        pool.shutdown(cancel_futures=True)
        second.down(keep_logs=bool(os.environ.get("COCOA_KEEP_SLURM")))


@contextmanager
def at_peace(site: Site, *, name: str) -> Iterator[None]:
    """Afterwards no job, no process and no cut node is left; tells the times."""
    began = time.monotonic()
    try:
        yield
    finally:
        site.clean_up()
        wait_for(lambda: site.cluster.idle() == set(NODES), what="all nodes back", seconds=60)
    took = time.monotonic() - began
    sys.stderr.write(f"\n  {took:5.1f} s {name}: {'; '.join(site.times)}\n")


@pytest.fixture
def site(
    cluster: Cluster, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Site]:
    """A folder to submit from."""
    made = Site(cluster, checkout, tmp_path, python=Path(sys.executable))
    with at_peace(made, name=request.node.name):
        yield made
