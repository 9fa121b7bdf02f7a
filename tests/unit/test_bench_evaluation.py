"""tools/bench_evaluation.py: what it computes of the rounds, and when it calls itself passed."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "bench_evaluation", ROOT / "tools" / "bench_evaluation.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def figures(bench, share: float) -> dict:
    seconds = {"forward": [1.0, 2.0, 4.0], "trainer": [1.0 / share, 2.0 / share, 4.0 / share]}
    arms = bench.summary(seconds, tokens=1_000_000)
    one = {"parameters": 1_050_000, "sides": {"texts": {"tokens": 1_000_000, "arms": arms}}}
    return {
        **{"command": "c", "sets": "s", "rounds": 3, "torch": "2", "machine": "m"},
        **{"sentence_transformers": "6", "models": [one]},
    }


def test_a_share_is_the_median_of_the_rounds_own(bench):
    seconds = {"forward": [1.0, 2.0, 30.0], "trainer": [2.0, 2.5, 25.0]}
    found = bench.summary(seconds, tokens=1_000_000)
    assert found["trainer"]["share"] == pytest.approx(0.8)  # of 0.5, 0.8 and 1.2
    assert found["forward"]["ms"] == pytest.approx(2.0)


@pytest.mark.parametrize(("share", "passed"), [(0.96, True), (0.94, False)])
def test_less_than_the_target_is_not_passed(bench, share, passed):
    found = figures(bench, share)
    assert bench.passed(found) is passed
    assert f"| trainer | {2 / share:.1f} (" in bench.page(found)


def test_arms_take_turns_and_a_first_round_does_not_count(bench):
    said = []
    arms = {name: (lambda name=name: said.append(name)) for name in ("a", "b")}
    found = bench.measure(arms, rounds=2)
    assert said == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}


@pytest.mark.slow
def test_it_measures_both_models(bench, capsys, tmp_path):
    command = ["quickstart", "--records", "8", "--rounds", "2", "--out", str(tmp_path / "figures")]
    assert bench.main(command) in (0, 1)
    written = (tmp_path / "figures.md").read_text()
    assert written.count("| folder |") == 4
    assert written in capsys.readouterr().out
