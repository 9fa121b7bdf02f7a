"""Ten random deaths of a real run; tools/chaos.py --deaths 100 is the long form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"
SEED = "34"  # its first ten deaths are of eight kinds, at all four moments


@pytest.mark.slow
def test_ten_random_deaths_change_nothing(tmp_path) -> None:
    out = tmp_path / "table"
    command = [sys.executable, str(TOOL), "debug", "--deaths", "10", "--seed", SEED]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "work"), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every run ended bit-identical to the undisturbed one" in done.stdout
    assert out.with_suffix(".md").read_text() in done.stdout
    found = json.loads(out.with_suffix(".json").read_text())
    assert len(found["deaths"]) == 10
    assert (found["lost"], found["repeated"], found["manual_steps"]) == (0, 0, 0)
    assert found["steps"] == 24 * found["rounds"]
