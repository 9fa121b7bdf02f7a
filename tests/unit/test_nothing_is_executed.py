"""Files that come from elsewhere are read as data: no pickle and no YAML tag runs anything."""

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cocoa_dist.config import ConfigError, load_recipe, load_resolved
from cocoa_dist.train.checkpoint import Checkpointer, Found


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_generator_file_is_no_program(tmp_path) -> None:
    folder, mark = tmp_path / "step_00000002", tmp_path / "executed"
    folder.mkdir()
    torch.save({"torch": Touches(mark)}, folder / "random_00000.pt")
    found = Found(folder, SimpleNamespace(world_size=1, step=2), ())
    engine = SimpleNamespace(load=lambda folder, *, written_by: None)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        Checkpointer(tmp_path, stage="one", keep_last=1).load(engine, found, seed=0)
    assert not mark.exists()


@pytest.mark.parametrize("load", [lambda path: load_recipe(str(path)), load_resolved])
def test_a_recipe_is_no_program(load, tmp_path) -> None:
    path, mark = tmp_path / "recipe.yaml", tmp_path / "executed"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(path)
    assert not mark.exists()
