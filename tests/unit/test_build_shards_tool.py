"""The command that builds, checks and shows data sets: what it prints, and how it refuses."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made_sources import png

TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
NAMED = ("--source", "a shelf", "--licence", "CC0-1.0", "--tokenizer", "asset:tokenizer")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, TOOLS)
    import build_shards

    sys.path.remove(TOOLS)
    return build_shards


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.png").write_bytes(png(number))
        (folder / f"{number:02d}.txt").write_text(f"thing {number}")
    (folder / "02.txt").write_text("  ")
    return folder


def run(tool: ModuleType, *arguments: object) -> int:
    return int(tool.main([str(argument) for argument in arguments]))


def test_build_verify_and_inspect(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "set", tmp_path / "sheet.html"
    assert run(tool, out, "--layout", "captions", pictures, "--processes", 1, *NAMED) == 0
    printed = capsys.readouterr().out
    assert "39 records" in printed
    assert "1 row left out: 1 text is empty" in printed
    assert "tokens were not counted" not in printed
    info = json.loads((out / "manifest.json").read_text())["info"]
    assert info.pop("build")
    assert info == {
        "name": "set",
        "source": "a shelf",
        "licence": "CC0-1.0",
        "layout": "captions",
        "rows": 40,
    }
    assert run(tool, out, "--layout", "captions", pictures, "--processes", 1, *NAMED) == 0
    assert "1 shards (1 were there, 0 written)" in capsys.readouterr().out
    assert run(tool, out, "--verify", "--tokenizer", "asset:tokenizer", "--processes", 1) == 0
    assert "39 records and 7 files" in capsys.readouterr().out
    assert run(tool, out, "--inspect", "--html", page) == 0
    shown = capsys.readouterr().out
    assert "1 text is empty" in shown
    assert "####" in shown
    assert page.read_text().count("<img") == 39


def test_a_damaged_data_set_is_exit_1(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert run(tool, out, pictures, "--layout", "captions", "--processes", 1) == 0
    shard = out / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes().replace(b"thing 1", b"thinG 1", 1))
    assert run(tool, out, "--verify", "--processes", 1) == 1
    assert "crc32 is 0x" in capsys.readouterr().out


def refusals(folder: Path) -> dict[str, tuple[list[object], str]]:
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years of work")
    (folder / "folder.csv").mkdir()
    (folder / "a.jsonl").write_text('{"question": "a"}\n')
    out, captions = folder / "out", ["--layout", "captions", "--processes", 1]
    return {
        "missing source": ([out, folder / "no", *captions], "no is not there"),
        "unknown format": ([out, folder / "full" / "thesis.txt", *captions], "'.txt' is unknown"),
        "missing column": ([out, folder / "a.jsonl", *captions], "column of 'image' is missing"),
        "unknown role": ([out, folder / "a.jsonl", "film=x", *captions], "has no role 'film'"),
        "not empty": ([folder / "full", folder / "pictures", *captions], "holds thesis.txt"),
        "no tokenizer": (
            [out, folder / "pictures", *captions, "--tokenizer", folder],
            "has no tokenizer.json",
        ),
        "too many bad": (
            [out, folder / "pictures", *captions, "--max-rejected", 0.01],
            "1 of 40 rows cannot become a record",
        ),
        "a folder as a table": ([out, folder / "folder.csv", *captions], "holds neither tables"),
        "verify nothing": ([out, "--verify"], "is not a data set"),
        "inspect nothing": ([out, "--inspect"], "is not a data set"),
    }


REFUSALS = (
    *("missing source", "unknown format", "missing column", "unknown role", "not empty"),
    *("a folder as a table", "no tokenizer", "too many bad", "verify nothing", "inspect nothing"),
)


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_input_is_one_message_and_exit_2(
    kind: str,
    tool: ModuleType,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = refusals(tmp_path)[kind]
    assert run(tool, *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_help_teaches(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(tool, "--help")
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for words in ("--layout mmeb", "rejected.jsonl", "WebDataset", "*text", "--verify"):
        assert words in printed


@pytest.mark.parametrize("arguments", [["out"], ["out", "a"], ["out", "--html", "x"]])
def test_a_command_that_makes_no_sense_is_exit_2(tool: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(tool, *arguments)
    assert left.value.code == 2
