"""The ranks of a bench: what they wrote comes back, and one that fails ends the others."""

import importlib
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
WORKER = """
import json, os, sys, time
job, rank = json.loads(sys.argv[2]), int(os.environ["RANK"])
if job["fails"]:
    if rank == 0:
        sys.exit("no such stage")
    time.sleep(600)
with open(job["output"], "w") as file:
    json.dump({"rank": rank, "of": os.environ["WORLD_SIZE"]}, file)
"""


@pytest.fixture
def run_ranks(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("ranks_of_a_bench").run_ranks


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return str(path)


def test_every_rank_gives_what_it_wrote(run_ranks, script) -> None:
    assert run_ranks({"fails": False}, ranks=2, script=script) == [
        {"rank": 0, "of": "2"},
        {"rank": 1, "of": "2"},
    ]


def test_a_rank_that_fails_ends_those_that_would_wait_for_it(run_ranks, script) -> None:
    began = time.monotonic()
    with pytest.raises(SystemExit, match="no such stage"):
        run_ranks({"fails": True}, ranks=2, script=script)
    assert time.monotonic() - began < 300  # the other one sleeps for 600 s
