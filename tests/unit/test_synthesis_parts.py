"""Prompts, pictures, pace and addresses of a synthesis, each by itself."""

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import pytest
from made_sources import make_record, png
from PIL import Image

from cocoa_dist.data.shards import write_shards
from cocoa_dist.data.synthesis.answers import (
    FaultError,
    Reply,
    check_answer,
    check_dialogue,
    text_digest,
)
from cocoa_dist.data.synthesis.bill import Bill, Prices
from cocoa_dist.data.synthesis.endpoint import Endpoint, endpoint_address, retry_after
from cocoa_dist.data.synthesis.estimate import estimate
from cocoa_dist.data.synthesis.pace import Pace, Patience
from cocoa_dist.data.synthesis.pictures import open_source, sent_picture, units
from cocoa_dist.data.synthesis.plan import Plan
from cocoa_dist.data.synthesis.prompts import PROMPT_DIR, load_prompt, prompt_names
from cocoa_dist.data.synthesis.talk import talk
from cocoa_dist.data.writing.layouts import Layout

ONE_CALL = "coma_dialogue_one_call"


@pytest.mark.parametrize("name", prompt_names())
def test_every_prompt_that_is_shipped_fills_its_slots(name: str) -> None:
    request = next(talk(load_prompt(name), key="k", caption="A {kinds} dog", asks=1))
    said = str(request.messages)
    for slot in ("{caption}", "{least}", "{most}", "{error}"):
        assert slot not in said
    if name == "cocoa_records":
        assert "A {kinds} dog" in said  # what a caption says is not a slot
        assert request.messages[-1]["content"][-1]["text"].count("\n- ") == 3


def test_a_changed_word_is_another_version(tmp_path: Path) -> None:
    shipped = load_prompt(ONE_CALL)
    changed = tmp_path / f"{ONE_CALL}.yaml"
    changed.write_text("form: dialogue\ntask: t\nrequest: Hi\ncorrection: No\nleast: 1\nmost: 2\n")
    with pytest.raises(ValueError, match="max_question_characters: Field required"):
        load_prompt(str(changed))
    source = (PROMPT_DIR / f"{ONE_CALL}.yaml").read_text()
    changed.write_text(source)
    assert load_prompt(str(changed)).version == shipped.version
    changed.write_text(source.replace("closely", "gladly"))
    assert load_prompt(str(changed)).version != shipped.version


BAD_PROMPTS = {
    "least: 3": ("least: 9", "least 9 is more than most 5"),
    "form: dialogue": ("form: poem", "form: Input should be"),
    "task: dialogue": ("task: dialogue\nfilm: x", "film: Extra inputs"),
    "temperature: 0.7": ("refusals: ['(']\ntemperature: 0.7", "is no pattern"),
}


@pytest.mark.parametrize("before", BAD_PROMPTS)
def test_a_prompt_that_makes_no_sense_is_refused(before: str, tmp_path: Path) -> None:
    after, message = BAD_PROMPTS[before]
    shipped = PROMPT_DIR / f"{ONE_CALL}.yaml"
    file = tmp_path / "p.yaml"
    file.write_text(shipped.read_text().replace(before, after))
    with pytest.raises(ValueError, match=message):
        load_prompt(str(file))


def test_kinds_are_drawn_by_key_and_all_are_used() -> None:
    prompt = load_prompt("cocoa_records")
    drawn = [tuple(prompt.kinds_for(f"key {number}")) for number in range(100)]
    assert drawn == [tuple(prompt.kinds_for(f"key {number}")) for number in range(100)]
    assert {kind for kinds in drawn for kind in kinds} == set(prompt.file.kinds)
    assert {len(kinds) for kinds in drawn} == {3}


def test_a_picture_is_sent_as_training_sees_it_and_says_nothing_of_its_camera() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0110] = "A camera of mine"
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (1400, 700), (9, 99, 9)).save(file, "JPEG", exif=exif)
    sent = sent_picture(file.getvalue(), max_pixels=500_000, max_decoded_pixels=10**8)
    assert (sent.height % 28, sent.width % 28) == (0, 0)
    assert sent.height * sent.width <= 500_000
    assert sent.height > sent.width
    assert b"camera" not in sent.data
    with Image.open(io.BytesIO(sent.data)) as image:
        assert image.size == (sent.width, sent.height)
        assert not image.getexif()


def test_a_small_lossless_picture_is_sent_pixel_for_pixel() -> None:
    data = png(7, height=30, width=40)
    sent = sent_picture(data, max_pixels=10**6, max_decoded_pixels=10**8)
    assert sent.mime == "image/png"
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(sent.data)) as after:
        assert before.convert("RGB").tobytes() == after.tobytes()


def test_pictures_come_from_shards_too(tmp_path: Path) -> None:
    write_shards([make_record(number) for number in range(3)], tmp_path / "set", info={})
    source = open_source([tmp_path / "set"], Layout("pictures"))
    found = list(units(source, 1, 3))
    assert [unit.key for unit in found] == ["k1", "k2"]
    assert found[0].caption == "thing number 1"  # type: ignore[union-attr]
    assert found[0].meta == {"licence": "CC0-1.0"}  # type: ignore[union-attr]


def test_an_address_with_a_key_in_it_is_refused_and_not_shown() -> None:
    assert endpoint_address("http://h:1/v1/chat/completions/") == "http://h:1/v1"
    for url in ("http://me:secret@h/v1", "http://h/v1?key=secret"):
        with pytest.raises(ValueError, match="--api-key-env") as raised:
            endpoint_address(url)
        assert "secret" not in str(raised.value)
    with pytest.raises(ValueError, match="expected http://HOST"):
        endpoint_address("localhost:8000")


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="variable NAME") as raised:
        Endpoint("http://h", key="sec\nret", key_name="NAME", timeout=1.0, calls=1)
    assert "sec" not in str(raised.value)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("7", now=0.0) == 7.0
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=40.0) == 60.0
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", now=400.0) == 0.0
    assert retry_after("soon", now=0.0) is None


def test_a_pace_lets_one_call_try_while_everything_fails() -> None:
    async def scenario() -> list[int]:
        patience = Patience(pause=0.001, breaker_failures=2)
        pace = Pace(requests_per_minute=0.0, patience=patience, check=lambda: None)
        for _ in range(2):
            async with pace.call() as trips:
                pace.failed(trips, "down")
        at_once, most = 0, []

        async def one() -> None:
            nonlocal at_once
            async with pace.call() as trips:
                at_once += 1
                most.append(at_once)
                await asyncio.sleep(0.01)
                at_once -= 1
                if len(most) < 3:
                    pace.failed(trips, "down")
                else:
                    pace.worked()

        await asyncio.gather(*(one() for _ in range(6)))
        return most

    most = asyncio.run(scenario())
    assert most[:3] == [1, 1, 1]
    assert max(most[3:]) > 1


def test_refusals_are_known_by_their_beginning_only() -> None:
    prompt = load_prompt("coma_dialogue")
    with pytest.raises(FaultError, match="refusal"):
        check_answer(Reply(content="I cannot assist with that."), prompt=prompt, before=())
    words = "The sign says: I cannot assist with that."
    assert check_answer(Reply(content=words), prompt=prompt, before=()) == words
    thought = "<think>Sorry, I can't tell yet.</think> A red door."
    assert check_answer(Reply(content=thought), prompt=prompt, before=()) == "A red door."


def test_an_answer_that_utf8_cannot_hold_is_malformed() -> None:
    with pytest.raises(FaultError, match="malformed text"):
        check_answer(Reply(content="a \ud800"), prompt=load_prompt("coma_dialogue"), before=())


def test_an_answer_that_was_given_before_is_repeated() -> None:
    prompt, long = load_prompt("coma_dialogue"), "It is a red door with a brass handle."
    with pytest.raises(FaultError, match="repeated answer"):
        check_answer(Reply(content=long.upper()), prompt=prompt, before=(long,))
    assert check_answer(Reply(content="Red."), prompt=prompt, before=("Red.",)) == "Red."


@pytest.mark.parametrize("content", ["[" * 100_000, "null", '{"turns": 1}', '{"turns": []} x'])
def test_hostile_json_is_malformed(content: str) -> None:
    with pytest.raises(FaultError, match="malformed JSON"):
        check_dialogue(Reply(content=content), load_prompt(ONE_CALL))


def test_equal_texts_are_equal_whatever_their_form() -> None:
    assert text_digest("A  Red door!") == text_digest("a red DOOR")
    assert text_digest("a red door") != text_digest("a red floor")


def test_a_bill_adds_up_whatever_the_order_of_ends() -> None:
    bill, prices = Bill(), Prices(1.0, 2.0)
    usage = {"prompt_tokens": 10**6, "completion_tokens": 10**6}
    for line in (
        {"e": "sent", "id": "a"},
        {"e": "sent", "id": "b"},
        {"e": "answer", "id": "b", "usage": usage, "cost": 5.0},
        {"e": "sent", "id": "c"},
        {"e": "sent", "id": "c"},  # of the next process
        {"e": "failure", "id": "a", "kind": "time-out", "lost": True},
        {"e": "sent", "id": "a"},
        {"e": "answer", "id": "a", "usage": usage, "cost": None},
        {"e": "sent", "id": "d"},
        {"e": "failure", "id": "d", "kind": "server error", "lost": False},
    ):
        bill.add(line)
    bill.count_killed()  # c, twice
    assert bill.sendings == bill.calls + bill.unconfirmed + sum(bill.failures.values()) == 6
    assert bill.total(prices) == 5.0 + 3.0
    assert bill.at_most(prices) == 8.0 + 3 * 4.0


def test_an_estimate_counts_all_calls_of_all_rows(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number, height=280, width=280))
    plan = Plan(load_prompt("coma_dialogue"), "m", "http://h/v1", 10**6, 10**8, asks=3)
    found = estimate(plan, open_source([tmp_path], Layout("pictures")), limit=2)
    assert (found.rows, found.calls) == (2, 12)
    assert found.prompt_tokens / found.calls > 100  # of the picture alone
    assert found.completion_tokens == 12 * 1024
    assert "..." in str(found.request)
    assert len(str(found.request)) < 4000


def test_nothing_of_a_synthesis_imports_torch() -> None:
    code = (
        "import sys, cocoa_dist.data.synthesis.run, cocoa_dist.data.synthesis.assemble;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
