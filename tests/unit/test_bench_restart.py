"""tools/bench_restart.py gives each part its own time, and explains what is long."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "tools" / "bench_restart.py"
    spec = importlib.util.spec_from_file_location("bench_restart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published():
    path = ROOT / "benchmarks" / "restart_cpu.json"
    if not path.is_file():
        pytest.skip("not measured yet")
    return path


def burn(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_a_part_inside_another_is_not_counted_twice(bench) -> None:
    clock = bench.Clock()
    with clock.part("outer"):
        burn(0.02)
        with clock.part("inner"):
            burn(0.06)
        burn(0.02)
    outer, inner = clock.parts["outer"][0], clock.parts["inner"][0]
    assert 0.04 <= outer < 0.06
    assert 0.06 <= inner < 0.08


def test_a_function_that_another_version_lacks_is_left_out(bench) -> None:
    clock = bench.Clock()
    clock.watch(time, "no_such_function", "nothing")
    assert "nothing" not in clock.parts


def test_the_rank_that_took_longer_is_the_one_that_counts(bench) -> None:
    sample = {
        "launcher": {"born": 10.0, "parts": {"interpreter": [0.1, 0.1]}},
        "rank0": {"born": 11.0, "parts": {"import torch": [1.0, 2.0]}},
        "rank1": {"born": 11.5, "parts": {"import torch": [1.5, 1.0]}},
    }
    found = bench.summarise([sample])
    assert found["rank"] == {"import torch": [1.5, 1.0]}
    assert found["wall_seconds"] == 3.0


def test_the_table_is_that_of_the_figures_beside_it(bench, published) -> None:
    figures = json.loads(published.read_text())
    assert bench.table(figures) == published.with_suffix(".md").read_text()


def test_every_part_above_a_second_is_explained(bench, published) -> None:
    figures = json.loads(published.read_text())
    long = bench._above_a_second(figures["arms"]["now"]["rank"])
    assert set(long) <= set(bench.EXPLAINED)
