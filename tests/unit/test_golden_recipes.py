"""Every recipe resolves as its golden file says, and can be planned for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cocoa_dist.config import load_recipe, recipe_names
from launcher.__main__ import main as launch

ROOT = Path(__file__).resolve().parents[2]


def test_recipes_resolve_as_their_golden_files() -> None:
    """Changed on purpose? python tools/build_golden_recipes.py, and look at the diff."""
    tool = [sys.executable, str(ROOT / "tools" / "build_golden_recipes.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in recipe_names() if "vl" in name])
def test_every_recipe_of_a_papers_size_has_a_plan(name: str, capsys) -> None:
    assert launch(["plan", name, "--gpus", "8", "--gpu", "h200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in told["stages"]] == list(load_recipe(name).stages)
    for stage in told["stages"]:
        assert sum(stage["memory"].values()) < 139 * 2**30


@pytest.mark.parametrize("name", ["coma_qwen2_5_vl_3b", "moca_qwen2_5_vl_3b"])
def test_every_value_of_a_papers_recipe_says_where_it_is_from(name: str) -> None:
    text = (ROOT / "cocoa_dist" / "recipes" / f"{name}.yaml").read_text()
    for value in ("learning_rate", "batch_size", "steps", "temperature", "rule", "freeze", "pool"):
        for line in text.splitlines():
            if line.strip().startswith(value):
                assert any(origin in line for origin in ("(paper)", "(code)", "(ours)")), line
