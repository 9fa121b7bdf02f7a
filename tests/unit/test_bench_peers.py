"""The bench beside the peers: rows, schedule, proofs and the page."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("bench_peers")


def turn(rate: float, memory: float = 1e6) -> dict[str, float]:
    return {"pairs": 64, "cpu_seconds": 64 / rate, "seconds": 2.0, "grown": memory}


def figures(**changes: Any) -> dict[str, Any]:
    proof = {"loss": 4.1, "parameters": 105, "norm": 2.0}
    turns = {
        "ours": [turn(20.0), turn(40.0)],
        "ours, GradCache": [turn(16.0), turn(32.0)],
        "MNRL": [turn(10.0), turn(10.0)],
        "Cached MNRL": [turn(8.0), turn(16.0)],
        "colpali": [],
    }
    return {
        "machine": "m",
        "pins": {"x": ["x==1"]},
        "sets": {kind: {"text_tokens": [2, 20.0, 65]} for kind in ("short", "mixed")},
        "proofs": {
            "short 64 x1": {
                "ours": {**proof, "difference": 0.0},
                "MNRL": {**proof, "difference": 1e-3},
                "other": {**proof, "difference": None},
            }
        },
        "turns": {"short 64 x1": turns},
        "why": {"colpali, short 64 x1": "no such module"},
        **changes,
    }


def test_ratios_are_within_rounds_and_of_the_right_arm() -> None:
    lines = load("peers_page").verdicts(figures())
    assert lines[0].startswith("- short 64 x1, ours over MNRL: 3.00 ")
    assert lines[1].startswith("- short 64 x1, ours, GradCache over Cached MNRL: 2.00 ")
    assert all(line.endswith(": met") for line in lines)


@pytest.mark.parametrize(
    ("kind", "rate", "word"),
    [("short", 1.5, "met"), ("short", 1.49, "**missed**"), ("mixed", 1.99, "**missed**")],
)
def test_targets_are_met_or_missed_at_their_limits(kind: str, rate: float, word: str) -> None:
    turns = {"ours, GradCache": [turn(rate)], "Cached MNRL": [turn(1.0)]}
    lines = load("peers_page").verdicts(figures(turns={f"{kind} 64 x1": turns}))
    assert lines[0].endswith(word)


def test_more_memory_than_cached_mnrl_is_a_miss() -> None:
    turns = {"ours, GradCache": [turn(9.0, memory=2e6)], "Cached MNRL": [turn(1.0, memory=1e6)]}
    lines = load("peers_page").verdicts(figures(turns={"mixed 64 x1": turns}))
    assert lines[1].endswith("**missed**")


def test_the_page_names_what_is_not_equal_and_what_did_not_run() -> None:
    text = load("peers_page").page(figures())
    assert "| short 64 x1 | MNRL | 4.100000 | 105 | 2.0000 | 1.0e-03 | **no** |" in text
    assert "| other parameters | **no** |" in text
    assert "| colpali | 0 | no such module |" in text
    assert "- colpali, short 64 x1: no such module" in text


def test_the_table_is_that_of_the_figures_beside_it() -> None:
    folder = ROOT / "benchmarks"
    found = json.loads((folder / "peers_cpu.json").read_text())
    assert load("peers_page").page(found) == (folder / "peers_cpu.md").read_text()


def test_arms_take_turns_and_a_call_goes_on_from_the_file(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(self: Any, arm: Any, case: Any, *, proof: str = "") -> dict[str, Any] | None:
        asked.append(arm.name)
        if arm.name == "Cached MNRL":
            self.figures["why"][f"{arm.name}, {case.name}"] = "cannot"
            return None
        return turn(5.0)

    monkeypatch.setattr(bench.Bench, "turn", answer)
    case = bench.Case("short", 64, 1)
    arms = [arm for arm in bench.ARMS if arm.everywhere]
    for first_round, last_round in ((0, 2), (1, 3)):  # the second call repeats a round that is done
        found = bench.Bench(tmp_path / "out.json", tmp_path, {})
        for number in range(first_round, last_round):
            found.round(case, arms, number)
    names = [arm.name for arm in arms]
    assert asked[:4] == names
    assert asked[4:7] == [name for name in names[1:] + names[:1] if name != "Cached MNRL"]
    assert len(asked) == 4 + 3 + 3
    kept = json.loads((tmp_path / "out.json").read_text())
    assert {name: len(turns) for name, turns in kept["turns"][case.name].items()} == {
        **dict.fromkeys(names, 3),
        "Cached MNRL": 0,
    }


def test_other_gradients_and_other_parameters_show(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "ours": {"a": torch.ones(4)},
        "ours, GradCache": {"a": torch.ones(4)},
        "MNRL": {"a": torch.full((4,), 1.5)},
        "Cached MNRL": {"b": torch.ones(4)},
    }

    def answer(self: Any, arm: Any, case: Any, *, proof: str = "") -> dict[str, Any]:
        torch.save(given[arm.name], proof)
        return {"loss": 1.0}

    monkeypatch.setattr(bench.Bench, "turn", answer)
    found = bench.Bench(tmp_path / "out.json", tmp_path, {})
    found.prove(bench.Case("short", 64, 1), [arm for arm in bench.ARMS if arm.everywhere])
    rows = found.figures["proofs"]["short 64 x1"]
    assert {name: row["difference"] for name, row in rows.items()} == {
        "ours": 0.0,
        "ours, GradCache": 0.0,
        "MNRL": 0.5,
        "Cached MNRL": None,
    }


def test_mixed_texts_have_the_lengths_that_are_asked_for() -> None:
    rows = load("peers_rows")
    tokenizer = load("cocoa_dist.data.vocabulary").load_tokenizer(
        ROOT / "cocoa_dist" / "assets" / "tokenizer"
    )
    found = list(rows._rows("mixed", 60))
    lengths = [len(tokenizer.encode(row.text).ids) for row in found]
    assert min(lengths) >= rows.TEXT_TOKENS[0]
    assert max(lengths) <= rows.TEXT_TOKENS[1]
    assert max(lengths) > 100
    import io

    from PIL import Image

    sides = {Image.open(io.BytesIO(row.image)).size for row in found}
    tokens = {wide * high // rows.SIDE**2 for wide, high in sides}
    assert min(tokens) == 1
    assert max(tokens) == rows.MOST_SIDE**2


@pytest.mark.slow
def test_our_arms_run_in_forked_processes(bench: ModuleType, tmp_path: Path) -> None:
    """Without the peers, which are not installed: the server, its figures and the proof."""
    rows = load("peers_rows")
    rows.lay_down(tmp_path, batches=[16], most_rows=64)
    found = bench.Bench(tmp_path / "out.json", tmp_path, {"ours": Path(sys.executable)})
    arms = [arm for arm in bench.ARMS if arm.module == "ours"]
    case = bench.Case("short", 16, 2)
    try:
        found.prove(case, arms)
        found.round(case, arms, 0)
    finally:
        found.close()
    assert found.figures["why"] == {}
    assert found.figures["proofs"][case.name]["ours, GradCache"]["difference"] < 1e-5
    for turns in found.figures["turns"][case.name].values():
        assert turns[0]["pairs"] == 16
        assert turns[0]["cpu_seconds"] > 0
        assert turns[0]["grown"] > 0


@pytest.mark.slow
def test_a_turn_without_memory_says_so_and_pushes_nobody_out() -> None:
    """64 MiB of 256 are there, 1 GiB is not."""
    code = (
        "import torch, peers_server; peers_server.limit_memory(2**28); torch.ones(2**24); "
        "print('fits', flush=True); torch.ones(2**28)"
    )
    command, folder = [sys.executable, "-c", code], ROOT / "tools"
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "fits\n"
    assert "can't allocate memory" in done.stderr
