"""A stage whose steps are blocks of several data sets: trained, left, resumed on other ranks."""

from pathlib import Path

import pytest
import torch
from incarnations import STAGE, Incarnation, Moment, end, history, losses, records

from cocoa_dist.metrics import read_json_lines

pytestmark = pytest.mark.slow

MORE = f"stages.{STAGE}.data.sources.more"
BLOCKS = (
    *(f"stages.{STAGE}.data.task_block=4", f"{MORE}.path=asset:emoji/validation"),
    *(f"{MORE}.limit=32", f"stages.{STAGE}.steps=8"),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    Incarnation(run_dir, *BLOCKS).finish()
    return run_dir


def test_the_sample_log_names_the_data_set_of_every_block(undisturbed) -> None:
    for line in read_json_lines(undisturbed / "samples" / f"{STAGE}.jsonl"):
        assert sum(count for _, count in line["blocks"]) == len(line["records"]) == 24
        assert all(count % 4 == 0 for _, count in line["blocks"])
        assert line["dataset"] == " + ".join(dict.fromkeys(name for name, _ in line["blocks"]))
    cursors = end(undisturbed)[1].data_state["cursors"]
    assert sum(cursors.values()) == 8 * 24
    assert set(cursors) == {"emoji", "more"}


@pytest.mark.parametrize("world_size", [2, 1])
def test_it_goes_on_as_it_would_have(world_size: int, undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "run"
    Incarnation(run_dir, *BLOCKS, moment=Moment("leaves", "all", 3)).finish()
    assert 0 < end(run_dir)[1].step < 8
    Incarnation(run_dir, *BLOCKS, world_size=world_size).finish()
    assert records(run_dir) == records(undisturbed)
    if world_size == 2:
        assert history(run_dir) == history(undisturbed)
    torch.testing.assert_close(
        torch.tensor(losses(run_dir)), torch.tensor(losses(undisturbed)), rtol=1e-5, atol=1e-5
    )
