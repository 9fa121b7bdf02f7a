"""What several tests of this folder start."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_prometheus import Prometheus


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A real Prometheus of this machine with our rules; skips with the reason where it has none."""
    for name in ("prometheus", "prometheus-alertmanager"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (apt-get install {name})")
    server = Prometheus(tmp_path, targets=tmp_path / "targets")
    yield server
    server.stop()
