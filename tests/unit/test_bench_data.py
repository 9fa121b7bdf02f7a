"""The bench of data: all arms that are installed read the same bytes; tables say what was found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = {
    **{"sequential": 100.0, "shuffled": 100.0, "random": 100.0, "bytes": 7},
    **{"first": 0.1, "resume": 0.1, "memory": 3.0, "plain_tokens": 5.0, "plain_records": 10.0},
}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "tools" / "bench_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_figures_beside_it(bench: ModuleType) -> None:
    folder = ROOT / "benchmarks"
    figures = json.loads((folder / "data_cpu.json").read_text())
    assert bench.tables(figures) == (folder / "data_cpu.md").read_text()


def ratios(bench: ModuleType, **own: float) -> dict[str, bool]:
    """Which targets are met, by the first words of their lines behind whose they are."""
    ours = {**FIGURES, "tokens": 5.0, "records": 15.0, **own}
    lines = bench.verdicts({"ours": ours, "mds": dict(FIGURES)})
    assert all(line.startswith("- ours, ") for line in lines)
    return {line.split()[2]: line.endswith(": met") for line in lines}


def test_targets_are_met_or_missed_at_their_limits(bench: ModuleType) -> None:
    all_met = dict.fromkeys(("sequential", "shuffled", "random", "single", "end"), True)
    assert ratios(bench, random=500.0) == all_met
    assert ratios(bench, random=499.0) == {**all_met, "single": False}
    assert ratios(bench, random=99.0) == {**all_met, "single": False, "random": False}
    assert ratios(bench, random=500.0, records=14.9) == {**all_met, "end": False}
    assert ratios(bench, random=500.0, sequential=99.0) == {**all_met, "sequential": False}


def test_figures_are_medians_and_a_peer_that_is_missing_says_why(bench: ModuleType) -> None:
    turns = [{**FIGURES, "tokens": 1.0, "records": 2.0, "sequential": x} for x in (1.0, 9.0, 3.0)]
    figures: dict[str, Any] = {
        "rounds": {"ours": turns},
        "arms": ["ours", "lance"],
        "versions": {"lance": "1.0"},
        "why": {"lance": "cannot be installed: no network"},
        "settings": {"records": 5, "megabytes": 1.0},
        **{"command": "c", "machine": "m", "data": "d", "repeats": 3},
    }
    page = bench.tables(figures)
    assert "| ours | 3 | 100 |" in page
    assert "| lance 1.0 | cannot be installed: no network |" in page


def test_a_peer_that_cannot_be_installed_is_named_and_the_others_go_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], **_: object) -> str:
        if "venv" in command:
            (tmp_path / "lib" / "python3" / "site-packages").mkdir(parents=True)
        if any(part.startswith("pylance") for part in command):
            raise bench.CannotError("no matching distribution")
        return ""

    monkeypatch.setattr(sys.modules["peer_environments"], "run", refuse)
    _, why = bench.peer_python(
        tmp_path, {"mds": ["mosaicml-streaming==1"], "lance": ["pylance==1"]}
    )
    assert why == {"lance": "cannot be installed: no matching distribution"}


def test_without_a_network_the_emoji_are_read(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: list[str], **_environment: str) -> str:
        raise bench.CannotError("apt-get is missing")

    monkeypatch.setattr(bench, "run", refuse)
    path, what = bench.pictures(tmp_path, quick=False)
    assert path.name == "train"
    assert "no clip art: apt-get is missing" in what


@pytest.mark.slow
def test_arms_that_are_installed_read_the_same_records(tmp_path: Path) -> None:
    out = tmp_path / "data"
    command = [sys.executable, str(ROOT / "tools" / "bench_data.py"), "--quick"]
    done = subprocess.run(
        [*command, "--records", "64", "--cache", str(tmp_path / "cache"), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.with_suffix(".json").read_text())
    assert {*figures["rounds"]} == {"energon", "ours", "webdataset"}, figures["why"]
    assert {*figures["why"]} == {"datasets", "lance", "litdata", "mds"}
    for turns in figures["rounds"].values():
        assert all(value > 0 for key, value in turns[0].items() if key != "memory")
    assert out.with_suffix(".md").read_text() in done.stdout
    assert list((tmp_path / "cache").iterdir()) == []  # its data sets are taken away
