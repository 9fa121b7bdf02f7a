"""A loader process of one rank is killed while a stage trains: the same run, and it is told."""

import pytest
from incarnations import STAGE, Incarnation, Moment, history

from cocoa_dist.metrics import read_json_lines
from launcher.status import count_loader_restarts

pytestmark = pytest.mark.slow


def test_a_loader_s_death_is_counted_and_changes_nothing(tmp_path) -> None:
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    Incarnation(calm, "data.num_workers=1").finish()
    moment = Moment("loses_a_worker", rank="1", count=4)
    said = Incarnation(hit, "data.num_workers=1", moment=moment).finish()
    assert "the workers are started again, nothing is lost" in said
    assert history(hit) == history(calm)
    lines = list(read_json_lines(hit / "metrics.jsonl"))
    assert sum(line["loader_restarts"] for line in lines) == 1
    assert all(line["shrunk_pictures"] > 0 for line in lines)
    assert count_loader_restarts(hit) == 1
    assert count_loader_restarts(calm) == 0
    (line,) = read_json_lines(hit / "loader_deaths" / f"{STAGE}.rank1.jsonl")
    assert line["stage"] == STAGE
    assert line["step"] >= 4
    assert "was ended by SIGKILL" in line["what"]
