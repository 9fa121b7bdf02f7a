"""What several tests of this folder start."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_prometheus import Prometheus, missing_servers


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A real Prometheus of this machine with our rules; skips with the reason where it has none."""
    if reason := missing_servers():
        pytest.skip(reason)
    server = Prometheus(tmp_path, targets=tmp_path / "targets")
    yield server
    server.stop()
