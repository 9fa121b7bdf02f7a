"""The published table of GradCache says what was measured."""

import argparse
import ast
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "tools" / "bench_gradcache.py"
    spec = importlib.util.spec_from_file_location("bench_gradcache", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_figures_beside_it(bench) -> None:
    folder = ROOT / "benchmarks"
    figures = json.loads((folder / "gradcache_cpu.json").read_text())
    kept = {k: v for k, v in figures["settings"].items() if k != "recipe"}
    settings = {key: ast.literal_eval(text) for key, text in kept.items()}
    arguments = argparse.Namespace(recipe=figures["settings"]["recipe"], **settings)
    assert bench.tables(figures, arguments) + "\n" == (folder / "gradcache_cpu.md").read_text()


def test_a_target_that_is_missed_is_printed_as_missed(bench) -> None:
    assert bench.verdict("time 1.40x", 1.4, 1.4).startswith("**PASS** time 1.40x")
    assert bench.verdict("time 1.41x", 1.41, 1.4).startswith("**FAIL** time 1.41x")
