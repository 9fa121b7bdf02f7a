"""Ten random deaths of a real run; tools/chaos.py --deaths 100 is the long form."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
def test_ten_random_deaths_change_nothing(tmp_path) -> None:
    command = [sys.executable, str(TOOL), "debug", "--deaths", "10", "--seed", "7"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 deaths in " in done.stdout
    assert "every run ended bit-identical to the undisturbed one" in done.stdout
