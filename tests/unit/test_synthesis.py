"""Asking a model about pictures: every way in which it goes wrong has a name, and a bill."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_sources import png
from mllm_server import COMPLETION_TOKENS, KEY, PROMPT_TOKENS, Fault, Model, picture_of, serving

from cocoa_dist.data.records import Record
from cocoa_dist.data.synthesis import journal
from cocoa_dist.data.synthesis.assemble import SynthesisSource
from cocoa_dist.data.synthesis.bill import Prices
from cocoa_dist.data.synthesis.endpoint import EndpointStopError
from cocoa_dist.data.synthesis.pace import NothingWorksError, Patience
from cocoa_dist.data.synthesis.pictures import open_source
from cocoa_dist.data.synthesis.plan import Plan
from cocoa_dist.data.synthesis.prompts import load_prompt
from cocoa_dist.data.synthesis.run import Outcome, RunOptions, Stop, synthesise
from cocoa_dist.data.writing.layouts import Layout
from cocoa_dist.data.writing.source import Rejected, Source

IN_TURN, ONE_CALL, RECORDS = "coma_dialogue", "coma_dialogue_one_call", "cocoa_records"
QUICK = Patience(tries=4, pause=0.01, breaker_failures=50)
PRICES = Prices(prompt=10.0, completion=40.0)
COST = PRICES.cost(prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS)


@pytest.fixture(autouse=True)
def _disk_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here; a busy disk takes 50 ms for each line that is made durable."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    return made(tmp_path, 4)


def made(folder: Path, count: int) -> Source:
    place = folder / "pictures"
    place.mkdir()
    for number in range(count):
        (place / f"{number:02d}.png").write_bytes(png(number, height=30, width=40))
        (place / f"{number:02d}.txt").write_text(f"thing {number}")
    return open_source([place], Layout("pictures"))


def plan(address: str, prompt: str = ONE_CALL, **changes: Any) -> Plan:
    settings = {"max_pixels": 10**6, "max_decoded_pixels": 10**8, "asks": 3, **changes}
    return Plan(prompt=load_prompt(prompt), model="m-7b", address=address, **settings)


def options(**changes: Any) -> RunOptions:
    settings = {"key": KEY, "key_name": "THE_KEY", "patience": QUICK, "prices": PRICES, **changes}
    return RunOptions(**{"timeout": 60.0, "concurrency": 2, **settings})


def ask(
    model: Model, source: Source, folder: Path, prompt: str = ONE_CALL, **changes: Any
) -> tuple[Outcome, list[Record], list[Rejected]]:
    """Run to the end, and return what became of it."""
    with serving(model) as address:
        asked = plan(address, prompt)
        outcome = synthesise(asked, source, folder / "out", options=options(**changes), stop=Stop())
    rows = list(assembled(asked, source, folder, outcome.rows))
    records = [row for row in rows if isinstance(row, Record)]
    return outcome, records, [row for row in rows if isinstance(row, Rejected)]


def assembled(asked: Plan, source: Source, folder: Path, rows: int) -> list[Record | Rejected]:
    found = SynthesisSource.of(asked, source, folder / "out", rows=rows)
    return list(found.rows(0, len(found)))


def first(number: int, fault: str) -> Callable[[int, dict[str, Any]], Fault]:
    """Return faults: this one for the first so many requests."""
    return lambda place, body: fault if place < number else None


def test_a_dialogue_is_asked_in_turn_with_what_was_said_before(
    pictures: Source, tmp_path: Path
) -> None:
    model = Model()
    outcome, records, rejected = ask(model, pictures, tmp_path, IN_TURN, concurrency=1)
    assert (outcome.ended, len(records), rejected) == (4, 4, [])
    assert outcome.bill.calls == len(model.requests) == 4 * 4  # the questions, three answers
    first_picture = model.requests[:4]
    assert [len(body["messages"]) for body in first_picture] == [2, 2, 4, 6]
    assert len({picture_of(body) for body in first_picture}) == 1
    assert "response_format" in first_picture[0]
    assert "response_format" not in first_picture[1]
    record = records[0]
    assert [part.kind for part in record.query] == ["image"]
    assert record.meta["roles"] == ["user", "assistant"] * 3
    assert record.target[0].text in str(first_picture[1])
    assert record.target[1].text in str(first_picture[2])
    assert record.key == "00.png"


def test_records_of_other_kinds_for_each_picture(pictures: Source, tmp_path: Path) -> None:
    model = Model()
    outcome, records, _ = ask(model, pictures, tmp_path, RECORDS)
    assert (outcome.bill.calls, len(records)) == (4, 12)
    assert len({record.task for record in records}) > 3
    assert records[0].key.startswith("00.png#")
    assert [part.kind for part in records[0].query] == ["image", "text"]
    assert records[0].positives == (records[0].target,)
    assert "thing 0" in str(model.requests)  # the caption goes along


def test_provenance_is_in_every_record_and_the_key_nowhere(
    pictures: Source, tmp_path: Path
) -> None:
    _, records, _ = ask(Model(), pictures, tmp_path, RECORDS)
    found = records[0].meta["synthesis"]
    assert found.pop("date").startswith("20")
    assert found.pop("endpoint").startswith("http://127.0.0.1")
    assert found == {
        "model": "m-7b",
        "prompt": f"{RECORDS}@{load_prompt(RECORDS).version}",
        "source_key": "00.png",
        "usage": {
            "calls": 1,
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "shared_by": 3,
        },
    }
    assert KEY not in (tmp_path / "out" / "journal.jsonl").read_text()


USABLE_AFTER_ANOTHER_ASK = ("malformed", "wrong count", "empty", "cut off", "too long")


@pytest.mark.parametrize("fault", [*USABLE_AFTER_ANOTHER_ASK, "half of a pair"])
def test_an_unusable_answer_is_asked_for_again_and_paid_for(
    fault: str, pictures: Source, tmp_path: Path
) -> None:
    model = Model(faults=first(1, fault))
    outcome, records, _ = ask(model, pictures, tmp_path, concurrency=1)
    assert len(records) == 4
    assert outcome.bill.calls == sum(model.billed.values()) == 5
    told = model.requests[1]["messages"]
    assert len(told) == (2 if fault == "empty" else 4)  # there is nothing to answer to
    if fault != "empty":
        assert "This cannot be used" in told[-1]["content"]


REASONS = {
    "malformed": "malformed JSON: ",
    "wrong count": "wrong count: found 7 turns, expected 3 to 5",
    "empty": "empty answer: the answer has no words",
    "cut off": "too long: the answer was cut off at 2048 tokens",
    "too long": "too long: answer 1 has 9999 characters, expected at most 1500",
    "same everywhere": "repeated answer: answer 'This is a picture",
    "half of a pair": "malformed JSON: turns.0.question: ",
    "refusal": "refusal: 'I will not look",
    "said refusal": "refusal: ",
    "400": "refused by the endpoint: 400: code 400",
    "413": "refused by the endpoint: 413: ",
    "garbage": "malformed body: JSONDecodeError in '<html>",
}
AT_ONCE = ("refusal", "said refusal", "400", "413")


@pytest.mark.parametrize("fault", REASONS)
def test_a_picture_without_a_usable_answer_is_left_out_by_name(
    fault: str, pictures: Source, tmp_path: Path
) -> None:
    model = Model(faults=lambda number, body: fault)
    outcome, records, rejected = ask(model, pictures, tmp_path, limit=2, concurrency=1)
    assert records == []
    assert all(row.reason.startswith(REASONS[fault]) for row in rejected), rejected
    assert rejected[0].where.endswith("00.png")
    assert len(model.requests) == 2 * (1 if fault in AT_ONCE else 3)
    assert outcome.ended == outcome.rows == 2
    assert outcome.bill.calls == sum(model.billed.values())
    assert KEY not in rejected[0].reason


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut", "slow"])
def test_a_call_that_fails_is_made_again(fault: str, pictures: Source, tmp_path: Path) -> None:
    model = Model(faults=first(2, fault), slow_seconds=3.0)
    outcome, records, _ = ask(model, pictures, tmp_path, timeout=2.0 if fault == "slow" else 60.0)
    bill = outcome.bill
    assert len(records) == 4
    assert (bill.sendings, bill.calls) == (6, 4)
    assert bill.calls == sum(model.billed.values())
    assert sum(bill.failures.values()) == (2 if fault.isdigit() else 0)
    assert bill.unconfirmed == (0 if fault.isdigit() else 2)
    assert bill.total(PRICES) == pytest.approx(4 * COST)
    assert bill.at_most(PRICES) == pytest.approx((4 + bill.unconfirmed) * COST)


def test_without_idempotency_the_bill_lies_between_calls_and_unconfirmed(
    pictures: Source, tmp_path: Path
) -> None:
    model = Model(faults=first(2, "cut"), honours_keys=False)
    outcome, _, _ = ask(model, pictures, tmp_path)
    assert sum(model.billed.values()) == outcome.bill.calls + outcome.bill.unconfirmed == 6


def test_a_429_holds_all_calls_as_long_as_it_says(pictures: Source, tmp_path: Path) -> None:
    model = Model(faults=first(1, "429"), retry_after="1")
    outcome, records, _ = ask(model, pictures, tmp_path, concurrency=1)
    assert len(records) == 4
    assert model.times[1] - model.times[0] >= 1.0
    assert outcome.bill.failures == {"rate limited": 1}


def test_a_wait_of_an_hour_ends_the_run(pictures: Source, tmp_path: Path) -> None:
    model = Model(faults=first(1, "429"), retry_after="3600")
    with pytest.raises(NothingWorksError, match="asks to wait 3600 s"):
        ask(model, pictures, tmp_path)


def test_requests_per_minute(tmp_path: Path) -> None:
    model = Model()
    ask(model, made(tmp_path, 5), tmp_path, requests_per_minute=600, concurrency=4)
    assert model.times[-1] - model.times[0] >= 0.1 * 4 - 0.25  # one slice may be caught up


def test_no_more_calls_at_a_time_than_asked_for(tmp_path: Path) -> None:
    model = Model(seconds=0.2)
    ask(model, made(tmp_path, 9), tmp_path, concurrency=3)
    assert model.most_at_once == 3


STOPPED = {
    "401": "answers 401: it does not take the key in THE_KEY",
    "403": "answers 403",
    "404": "correct --endpoint or --model",
    "402": "no money left",
    "no money": "no money left",
    "301": "correct --endpoint",
}


@pytest.mark.parametrize("fault", STOPPED)
def test_what_every_call_would_meet_stops_the_run_at_once(
    fault: str, pictures: Source, tmp_path: Path
) -> None:
    model = Model(faults=lambda number, body: fault)
    with pytest.raises(EndpointStopError, match=STOPPED[fault]) as raised:
        ask(model, pictures, tmp_path, concurrency=1)
    assert len(model.requests) == 1
    assert KEY not in str(raised.value)
    assert KEY not in (tmp_path / "out" / "journal.jsonl").read_text()


def test_a_missing_key_is_said_to_be_missing(pictures: Source, tmp_path: Path) -> None:
    with pytest.raises(EndpointStopError, match="THE_KEY, which is not set"):
        ask(Model(), pictures, tmp_path, key="")


def test_when_everything_fails_the_run_ends_and_goes_on_later(
    pictures: Source, tmp_path: Path
) -> None:
    patience = Patience(
        tries=99, pause=0.001, longest_pause=0.01, breaker_failures=4, breaker_trips=3
    )
    model = Model(faults=first(20, "500"))
    with serving(model) as address:
        with pytest.raises(NothingWorksError, match="every call fails, the last one with: server"):
            run(address, pictures, tmp_path, patience=patience)
        assert len(model.requests) <= 9  # 4, 3 trials, and one more under way each time
        model.faults = lambda number, body: None
        outcome = run(address, pictures, tmp_path)
    assert (outcome.ended, outcome.bill.calls) == (4, 4)


def run(address: str, source: Source, folder: Path, **changes: Any) -> Outcome:
    return synthesise(
        plan(address), source, folder / "out", options=options(**changes), stop=Stop()
    )


def test_a_server_that_recovers_is_used_at_full_width_again(tmp_path: Path) -> None:
    patience = Patience(tries=99, pause=0.001, longest_pause=0.01, breaker_failures=4)
    model = Model(faults=first(6, "500"), seconds=0.15)
    outcome, records, _ = ask(model, made(tmp_path, 20), tmp_path, patience=patience, concurrency=4)
    assert (outcome.bill.calls, len(records)) == (20, 20)
    assert model.most_at_once >= 3  # 4 on a machine that has nothing else to do


def test_what_was_not_answered_stays_for_another_run(pictures: Source, tmp_path: Path) -> None:
    model = Model(faults=lambda number, body: "500")
    with serving(model) as address:
        outcome = run(address, pictures, tmp_path, limit=2)
        assert (outcome.ended, outcome.unanswered) == (0, {"server error": 2})
        left = assembled(plan(address), pictures, tmp_path, 2)
        assert [row.reason for row in left if isinstance(row, Rejected)] == [
            "no answer: not finished"
        ] * 2
        model.faults = lambda number, body: None
        outcome = run(address, pictures, tmp_path)
    assert (outcome.ended, outcome.bill.calls) == (4, 4)


def test_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    source, budget, model = made(tmp_path, 60), 0.5, Model()
    with serving(model) as address:
        outcome = run(address, source, tmp_path, budget=budget, concurrency=4)
        assert outcome.stopped.startswith("the budget of 0.5 is used up")
        spent = len(model.requests) * COST
        assert 0.7 * budget < spent <= budget  # the last call could have cost 0.1
        assert outcome.bill.total(PRICES) == pytest.approx(spent)
        outcome = run(address, source, tmp_path, budget=10.0)
    assert (outcome.stopped, outcome.ended) == ("", 60)
    assert len(model.requests) == 60


def test_the_same_answer_for_other_pictures_counts_once(tmp_path: Path) -> None:
    model = Model(faults=lambda number, body: "same everywhere")
    _, records, rejected = ask(model, made(tmp_path, 3), tmp_path, RECORDS)
    assert records == []  # within a record already
    assert {row.reason.partition(":")[0] for row in rejected} == {"repeated answer"}


def test_a_picture_that_comes_twice_is_asked_about_once(tmp_path: Path) -> None:
    source = made(tmp_path, 3)
    (tmp_path / "pictures" / "01.png").write_bytes((tmp_path / "pictures" / "00.png").read_bytes())
    model = Model()
    _, records, rejected = ask(model, source, tmp_path)
    assert len(model.requests) == len(records) == 2
    assert [row.reason for row in rejected] == ["repeated picture: the same as that of row 0"]


def test_a_broken_picture_is_never_sent(tmp_path: Path) -> None:
    source = made(tmp_path, 2)
    broken = tmp_path / "pictures" / "01.png"
    whole = png(9, height=300, width=300)
    broken.write_bytes(whole[: len(whole) // 2])
    model = Model()
    _, records, rejected = ask(model, source, tmp_path)
    assert len(model.requests) == len(records) == 1
    assert rejected[0].reason.startswith("picture cannot be used: ")


def test_journals_are_of_one_plan(pictures: Source, tmp_path: Path) -> None:
    with serving(Model()) as address:
        run(address, pictures, tmp_path)
        other = plan(address, max_pixels=10**5)
        with pytest.raises(ValueError, match="max pixels was 1000000, is 100000"):
            synthesise(other, pictures, tmp_path / "out", options=options(), stop=Stop())
        (tmp_path / "pictures" / "99.png").write_bytes(png(99))
        grown = open_source([tmp_path / "pictures"], Layout("pictures"))
        with pytest.raises(ValueError, match=r"source was .* rows was 4, is 5"):
            run(address, grown, tmp_path)


def test_a_line_cut_short_is_taken_off_and_asked_again(pictures: Source, tmp_path: Path) -> None:
    model = Model()
    with serving(model) as address:
        run(address, pictures, tmp_path, concurrency=1)
        file = tmp_path / "out" / "journal.jsonl"
        whole = file.read_bytes().splitlines(keepends=True)
        last = max(i for i, line in enumerate(whole) if b'"e":"answer"' in line)
        file.write_bytes(b"".join(whole[:last]) + whole[last][:40])
        outcome = run(address, pictures, tmp_path)
    assert outcome.ended == 4
    assert (outcome.bill.calls, outcome.bill.unconfirmed, outcome.bill.sendings) == (4, 1, 5)
    assert model.keys[-1] == model.keys[-2]
    assert sum(model.billed.values()) == outcome.bill.calls


def test_a_damaged_line_is_named(pictures: Source, tmp_path: Path) -> None:
    with serving(Model()) as address:
        run(address, pictures, tmp_path)
        file = tmp_path / "out" / "journal.jsonl"
        whole = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([*whole[:2], b"\0" * 40 + b"\n", *whole[3:]]))
        with pytest.raises(ValueError, match="line 3 is damaged"):
            run(address, pictures, tmp_path)


def test_a_picture_that_changed_since_is_not_given_another_ones_words(tmp_path: Path) -> None:
    source, model = made(tmp_path, 3), Model(faults=lambda number, body: "500" if number else None)
    with serving(model) as address:
        run(address, source, tmp_path, concurrency=1)  # the first one is answered
        (tmp_path / "pictures" / "00.png").write_bytes(png(77))
        rows = assembled(plan(address), source, tmp_path, 1)
        assert rows[0].reason.startswith("picture has changed: ")  # type: ignore[union-attr]
        (tmp_path / "pictures" / "01.png").write_bytes(png(78))
        with pytest.raises(ValueError, match=r"01.png is another picture than the one"):
            run(address, source, tmp_path)


def test_an_endpoint_that_refuses_everything_is_not_shown_all_pictures(tmp_path: Path) -> None:
    model = Model(faults=lambda number, body: "400")
    patience = Patience(breaker_failures=5)
    with pytest.raises(NothingWorksError, match="refuses every request, the last one with: 400"):
        ask(model, made(tmp_path, 30), tmp_path, patience=patience)
    assert len(model.requests) <= 6


class HalfADisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        piece = min(len(data), self._room)
        if not piece:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._room -= piece
        return int(self._file.write(data[:piece]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_disk_that_is_full_ends_the_run_and_leaves_a_whole_journal(
    pictures: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = journal._open_locked
    with serving(Model()) as address:
        with monkeypatch.context() as patch:
            patch.setattr(journal, "_open_locked", lambda path: HalfADisk(opened(path), 2000))
            with pytest.raises(ValueError, match=r"cannot be written on .*No space left"):
                run(address, pictures, tmp_path)
        file = tmp_path / "out" / "journal.jsonl"
        assert file.read_bytes().endswith(b"\n")
        outcome = run(address, pictures, tmp_path)
    assert (outcome.ended, outcome.stopped) == (4, "")
    assert outcome.bill.unconfirmed >= 1


def test_two_at_one_journal_are_one_too_many(pictures: Source, tmp_path: Path) -> None:
    asked = plan("http://127.0.0.1:9/v1")
    held = journal.Journal(tmp_path / "out" / "journal.jsonl", asked.facts(pictures))
    with pytest.raises(ValueError, match="another process is writing there"):
        synthesise(asked, pictures, tmp_path / "out", options=options(), stop=Stop())
    held.close()


def test_a_run_that_is_stopped_awaits_what_is_under_way(tmp_path: Path) -> None:
    source, stop, model = made(tmp_path, 20), Stop(), Model(seconds=0.1)

    def stop_soon(now: Outcome) -> None:
        if now.bill.calls >= 4:
            stop.request("enough")

    with serving(model) as address:
        outcome = synthesise(
            plan(address),
            source,
            tmp_path / "out",
            options=options(),
            stop=stop,
            on_progress=stop_soon,
        )
    assert outcome.stopped == "enough"
    assert outcome.ended < 20
    assert outcome.bill.calls == len(model.requests)
    assert outcome.bill.unconfirmed == 0
    assert json.loads((tmp_path / "out" / "journal.jsonl").read_text().splitlines()[-1])
