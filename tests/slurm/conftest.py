"""One SLURM cluster for all tests of this folder, and runs submitted to it."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import NODES, Cluster, missing, wait_for
from site_run import CHECKOUT, Site

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


@pytest.fixture
def site(cluster: Cluster, checkout: Path, tmp_path: Path) -> Iterator[Site]:
    """A folder to submit from; afterwards no job, no process and no cut node is left."""
    made = Site(cluster, checkout, tmp_path, python=Path(sys.executable))
    began = time.monotonic()
    yield made
    made.clean_up()
    wait_for(lambda: cluster.idle() == set(NODES), what="all nodes back", seconds=60)
    sys.stderr.write(f"\n  {time.monotonic() - began:5.1f} s in all; {'; '.join(made.times)}\n")
