"""The command that has training records written: no kill makes it lose or double anything."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from made_sources import TOKENIZER, png
from mllm_server import COMPLETION_TOKENS, KEY, PROMPT_TOKENS, THINGS, Fault, Model, serving
from test_loader import config, read

from cocoa_dist.data.samples import Vocabulary
from cocoa_dist.data.shards import ShardReader, verify

TOOLS = Path(__file__).resolve().parents[2] / "tools"
KILLS, PICTURES = 6, 40
PRICES = ("--price-in", "10", "--price-out", "40")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    import synthesize

    sys.path.remove(str(TOOLS))
    return synthesize


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COCOA_API_KEY", KEY)
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return made(tmp_path / "pictures", 6)


def made(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03d}.png").write_bytes(png(number, height=32, width=40))
    return folder


def arguments(address: str, *more: object, prompt: str = "coma_dialogue_one_call") -> list[str]:
    fixed = ("--endpoint", address, "--model", "m-7b", "--prompt", prompt, "--pause", "0.01")
    return [str(argument) for argument in (*fixed, "--processes", 1, *more)]


def run(
    tool: ModuleType, out: Path, pictures: Path, address: str, *more: object, **kind: str
) -> int:
    return int(tool.main([str(out), str(pictures), *arguments(address, *more, **kind)]))


def test_from_pictures_to_shards_sheet_and_bill(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", Model()
    with serving(model) as address:
        assert run(tool, out, pictures, address, *PRICES, "--licence", "CC0-1.0") == 0
        printed = capsys.readouterr().out
        assert "6 of 6" in printed
        assert "6 records in" in printed
        assert run(tool, out, pictures, address, *PRICES, "--licence", "CC0-1.0") == 0
    assert len(model.requests) == 6  # nothing was asked again
    verify(out / "shards")
    bill = json.loads((out / "bill.json").read_text())
    assert (bill["calls"], bill["prompt_tokens"]) == (6, 6 * PROMPT_TOKENS)
    assert bill["cost"] == pytest.approx(6 * (PROMPT_TOKENS * 10 + COMPLETION_TOKENS * 40) / 1e6)
    assert (out / "sheet.html").read_text().count("<img") == 6
    manifest = json.loads((out / "shards" / "manifest.json").read_text())
    assert manifest["info"]["model"] == "m-7b"
    assert manifest["info"]["licence"] == "CC0-1.0"
    for file in out.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("prompt", "view"),
    [
        ("cocoa_records", "bridged"),
        ("cocoa_records", "pair"),
        ("cocoa_records", "caption"),
        ("coma_dialogue_one_call", "bridged"),
    ],
)
def test_what_comes_out_can_be_trained_on(
    prompt: str, view: str, tool: ModuleType, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(Model()) as address:
        assert run(tool, out, pictures, address, "--tokenizer", TOKENIZER, prompt=prompt) == 0
    settings = config({"a": out / "shards"}, view=view, data={"tokens_per_pack": 4000})
    words = Vocabulary.load(TOKENIZER, settings.model)
    for (batch,) in read(settings, words, tmp_path / "blend", steps=2):
        assert batch.bad_records == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "recipe", "stage", "view"),
    [
        ("coma_dialogue", "debug_coma", "compression", "dialogue"),
        ("cocoa_records", "debug", "eos_bridged_reconstruction", "bridged"),
    ],
)
def test_two_steps_of_a_stage_train_on_it(
    prompt: str,
    recipe: str,
    stage: str,
    view: str,
    tool: ModuleType,
    pictures: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with serving(Model()) as address:
        assert run(tool, out, pictures, address, "--tokenizer", TOKENIZER, prompt=prompt) == 0
    changes = [
        f"stages.{stage}.data.sources={{made: {{path: {out / 'shards'}}}}}",
        f"stages.{stage}.data.view={view}",
        f"stages.{stage}.batch_size=6",
        *("data.max_text_tokens=256", "data.tokens_per_pack=2048"),
    ]
    command = ["-m", "cocoa_dist.train", recipe, *changes, "--stage", stage]
    done = subprocess.run(
        [sys.executable, *command, "--overfit-one-batch", "--steps", "2"],
        cwd=TOOLS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    losses = [float(loss) for loss in re.findall(r"step [12]: \S+ (\d+\.\d+)", done.stdout)]
    assert len(losses) == 2, done.stdout + done.stderr
    assert 0.0 < losses[1] < losses[0]


def test_a_first_look_and_then_all_of_it(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", Model()
    with serving(model) as address:
        assert run(tool, out, pictures, address, "--limit", 2) == 0
        assert len(ShardReader(out / "shards")) == 2
        assert run(tool, out, pictures, address) == 2
        assert "already holds a data set" in capsys.readouterr().err
        assert run(tool, out, pictures, address, "--replace") == 0
    assert len(ShardReader(out / "shards")) == 6
    assert len(model.requests) == 6


def test_a_dry_run_sends_and_writes_nothing(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", Model()
    with serving(model) as address:
        assert run(tool, out, pictures, address, "--dry-run", *PRICES) == 0
    printed = capsys.readouterr().out
    assert "data:image/png;base64," in printed
    assert "6 pictures, up to 6 calls" in printed
    assert "cost: at most about 0.5" in printed
    assert KEY not in printed
    assert not model.requests
    assert not out.exists()


def test_rows_without_an_answer_end_in_1_until_they_are_done_without(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    model = Model(faults=lambda number, body: "500" if number in (0, 1) else None)
    tries = ("--tries", 1, "--concurrency", 1)
    with serving(model) as address:
        assert run(tool, out, pictures, address, *tries) == 1
        assert "2 pictures have no answer yet" in capsys.readouterr().err
        model.faults = lambda number, body: "500"
        accepted = ("--accept-missing", "--max-rejected", 0.5)
        assert run(tool, out, pictures, address, *tries, *accepted) == 0
        assert "2 no answer" in capsys.readouterr().out
    assert len(ShardReader(out / "shards")) == 4


REFUSALS: dict[str, tuple[list[object], str]] = {
    "unknown prompt": (["--prompt", "poem"], "prompt 'poem' is unknown (have: cocoa_records"),
    "no address": (["--endpoint", "here"], "is no address"),
    "wrong key": (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE, which is not set"),
    "too many rejected": (["--max-pixels", 800, "--max-rejected", 0], "no row became a record"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_bad_input_is_one_message_and_exit_2(
    kind: str,
    tool: ModuleType,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more, message = REFUSALS[kind]
    with serving(Model(faults=lambda number, body: "refusal")) as address:
        assert run(tool, tmp_path / "out", pictures, address, *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_the_bill_is_there_when_the_money_runs_out(
    tool: ModuleType, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(faults=lambda number, body: "no money" if number >= 3 else None)
    with serving(model) as address:
        assert run(tool, tmp_path / "out", pictures, address, "--concurrency", 1) == 2
    assert "there is no money left" in capsys.readouterr().err
    bill = json.loads((tmp_path / "out" / "bill.json").read_text())
    assert (bill["sendings"], bill["calls"]) == (4, 3)
    assert bill["unconfirmed"] == 0


@pytest.mark.parametrize(
    "more", [["--budget", "3"], ["--concurrency", "0"], ["--body", "[]"], ["--pause", "-1"]]
)
def test_a_command_that_makes_no_sense_is_exit_2(
    more: list[str], tool: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as left:
        run(tool, tmp_path / "out", tmp_path, "http://h/v1", *more)
    assert left.value.code == 2


def failing(seed: int) -> Any:
    """Return faults for a third of the requests, all kinds in turn."""
    draw = random.Random(seed)
    said = ("malformed", "wrong count")
    kinds = ["429", "500", "cut", "slow", "reset", "503", *said]
    draw.shuffle(kinds)
    in_turn = itertools.cycle(kinds)

    def fault(number: int, body: dict[str, Any]) -> Fault:
        if draw.random() > 0.3:
            return None
        kind = next(in_turn)
        return None if kind in said and "response_format" not in body else kind

    return fault


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "honours_keys"),
    [("coma_dialogue", True), ("cocoa_records", True), ("cocoa_records", False)],
)
def test_killed_again_and_again_before_a_failing_server_nothing_is_lost_or_doubled(
    prompt: str, honours_keys: bool, tmp_path: Path
) -> None:
    """Every picture is there once, as if nothing had happened; the bill is what was answered."""
    folder, draw = made(tmp_path / "pictures", PICTURES), random.Random(7)
    model = Model(faults=failing(11), retry_after="0", slow_seconds=1.5, seconds=0.03)
    model.honours_keys = honours_keys
    calm = Model()
    with serving(model) as address:
        command = [sys.executable, str(TOOLS / "synthesize.py"), str(tmp_path / "out"), str(folder)]
        command += arguments(
            address, *PRICES, "--timeout", 1, "--asks", 9, "--tries", 99, prompt=prompt
        )
        for _ in range(KILLS):
            kill_after(command, model, answers=draw.randint(1, 9), seconds=0.1 * draw.random())
        last = subprocess.run(command, env=environment(), capture_output=True, check=False)
        assert last.returncode == 0, last.stderr.decode()
    assert {"429", "500", "cut", "slow"} <= model.done.keys()  # it did fail
    found = texts(tmp_path / "out" / "shards")
    with serving(calm) as address:
        command[2] = str(tmp_path / "calm")
        command[command.index("--endpoint") + 1] = address
        subprocess.run(command, env=environment(), capture_output=True, check=True)
    assert found == texts(tmp_path / "calm" / "shards")
    check_bill(tmp_path / "out", model)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_awaits_the_answers_under_way(number: signal.Signals, tmp_path: Path) -> None:
    folder, model = made(tmp_path / "pictures", PICTURES), Model(seconds=0.2)
    with serving(model) as address:
        command = [sys.executable, str(TOOLS / "synthesize.py"), str(tmp_path / "out"), str(folder)]
        with subprocess.Popen(
            command + arguments(address), env=environment(), stderr=subprocess.PIPE
        ) as process:
            while model.answered < 3 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    bill = json.loads((tmp_path / "out" / "bill.json").read_text())
    assert (bill["calls"], bill["unconfirmed"]) == (len(model.requests), 0)
    assert bill["calls"] < PICTURES


def environment() -> dict[str, str]:
    proxies = {"HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"}
    return {**{k: v for k, v in os.environ.items() if k not in proxies}, "COCOA_API_KEY": KEY}


def kill_after(command: list[str], model: Model, *, answers: int, seconds: float) -> None:
    """Start, and kill -9 a moment after the server has made so many more answers."""
    before = model.answered
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while model.answered < before + answers and process.poll() is None:
            assert time.monotonic() < deadline, "the server hears nothing"
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"


def texts(shards: Path) -> list[Any]:
    """Return what is in a data set, without what two runs may differ in."""
    verify(shards)
    reader = ShardReader(shards)
    records = [reader.record(number) for number in range(len(reader))]
    assert len({record.key for record in records}) == len(records)
    assert len({record.images for record in records}) == PICTURES
    assert all(
        any(thing in str(record.target) for thing in THINGS) or record.positives
        for record in records
    )
    return [(r.key, r.task, r.query, r.target, r.positives, r.images) for r in records]


def check_bill(out: Path, model: Model) -> None:
    """Compare with what the server counted: a call for each answer it made, or an unconfirmed one.

    A server that honours idempotency keys makes each answer once, and the bill is exact.
    """
    bill = json.loads((out / "bill.json").read_text())
    assert bill["calls"] == len(model.billed)
    assert (set(model.billed.values()) == {1}) is model.honours_keys
    assert sum(model.billed.values()) <= bill["calls"] + bill["unconfirmed"]
    assert bill["calls"] <= model.answered <= bill["calls"] + bill["unconfirmed"]
    assert bill["unconfirmed"] >= 1
    assert bill["prompt_tokens"] == bill["calls"] * PROMPT_TOKENS
    price = (PROMPT_TOKENS * 10 + COMPLETION_TOKENS * 40) / 1e6
    assert bill["cost"] == pytest.approx(bill["calls"] * price)
    ends = bill["calls"] + bill["unconfirmed"] + sum(bill["failures"].values())
    assert ends == bill["sendings"] >= len(model.requests)
