"""Every odd or broken thing that data can hold, through the real loader: used, or named and masked.

One record of twelve is the odd one; the other eleven and the order must not notice.
"""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_loader import TOKENIZER, config, read, record

from cocoa_dist.batch import StepBatch
from cocoa_dist.data import store
from cocoa_dist.data.record_source import fault_kind
from cocoa_dist.data.records import Record, text_part
from cocoa_dist.data.samples import Vocabulary
from cocoa_dist.data.shards import ShardReader, write_shards

ODD = 5
NUM_RECORDS = 12  # the batch size of test_loader: every step has every record
STEPS = 2


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load(TOKENIZER, config({"a": "x"}).model)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 40, width: int = 60) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png_header(height: int, width: int) -> bytes:
    """A PNG that says it has that size, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(), "JPEG", exif=exif)


def nan_tiff() -> bytes:
    grey = np.full((40, 60), np.nan, dtype=np.float32)
    return encoded(Image.fromarray(grey), "TIFF")


def animated() -> bytes:
    frames = [noise(), noise().rotate(90), noise().rotate(180)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


USED: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: encoded(noise().convert("CMYK"), "JPEG"),
    "palette": lambda: encoded(noise().convert("P"), "PNG"),
    "palette with transparency": lambda: encoded(noise().convert("P"), "PNG", transparency=3),
    "16 bit": lambda: encoded(
        Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20), "PNG"
    ),
    "EXIF rotated": rotated,
    "animated": animated,
    "one pixel": lambda: encoded(noise(1, 1), "PNG"),
    "grey and alpha": lambda: encoded(noise().convert("LA"), "PNG"),
    "one bit": lambda: encoded(noise().convert("1"), "TIFF"),
}
MASKED: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated PNG": (lambda: encoded(noise(), "PNG")[:3000], "picture is truncated"),
    "truncated JPEG": (lambda: encoded(noise(), "JPEG")[:900], "picture is truncated"),
    "truncated WEBP": (lambda: encoded(noise(), "WEBP")[:300], "picture is truncated"),
    "zero bytes": (lambda: b"", "picture is empty"),
    "zero size": (lambda: png_header(0, 60), "picture has no size"),
    "1 x 20000": (lambda: encoded(Image.new("L", (20000, 1)), "PNG"), "picture is too long"),
    "bomb": (lambda: png_header(50000, 50000), "picture is too large"),
    "smaller bomb": (lambda: png_header(11000, 10000), "picture is too large"),
    "a web page": (lambda: b"<!DOCTYPE html><html>404</html>", "not a picture"),
    "NaN": (nan_tiff, "picture is truncated"),
    "vector drawing": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
}


def write(path: Path, odd: Callable[[Record], Record] | None = None) -> Path:
    records = [record(number) for number in range(NUM_RECORDS)]
    if odd is not None:
        records[ODD] = odd(records[ODD])
    write_shards(records, path, info={}, records_per_batch=2, records_per_shard=4)
    return path


def steps(path: Path, vocabulary: Vocabulary, tmp_path: Path, **changes: Any) -> list[StepBatch]:
    run = config({"a": path}, **changes)
    return [ranks[0] for ranks in read(run, vocabulary, tmp_path / "blend", steps=STEPS)]


def assert_only_the_odd_one_is_masked(
    found: list[StepBatch], clean: list[StepBatch], kind: str, numbers: tuple[int, ...] = (ODD,)
) -> None:
    for one, other in zip(found, clean, strict=True):
        assert (one.digest, one.record_ids) == (other.digest, other.record_ids)
        assert sorted(bad.number for bad in one.bad_records) == list(numbers)
        assert {bad.kind for bad in one.bad_records} == {kind}
        for bad in one.bad_records:
            place = ShardLocation(bad.number)
            assert (bad.dataset, bad.shard, bad.row) == ("a", place.shard, place.row)
        assert one.num_samples == other.num_samples - len(numbers)


class ShardLocation:
    """Where `write` puts a record."""

    def __init__(self, number: int) -> None:
        self.shard, self.row = f"shard-{number // 4:05d}.arrow", number % 4


@pytest.fixture
def clean(vocabulary: Vocabulary, tmp_path: Path) -> list[StepBatch]:
    return steps(write(tmp_path / "clean"), vocabulary, tmp_path)


@pytest.mark.parametrize("kind", USED)
def test_an_odd_picture_is_used(
    kind: str, clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd", lambda one: replace(one, images=(USED[kind](),)))
    for one, other in zip(steps(path, vocabulary, tmp_path), clean, strict=True):
        assert one.bad_records == ()
        assert (one.digest, one.num_samples) == (other.digest, other.num_samples)


@pytest.mark.parametrize("kind", MASKED)
def test_a_broken_picture_is_masked_and_named(
    kind: str, clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    make, named = MASKED[kind]
    path = write(tmp_path / "odd", lambda one: replace(one, images=(make(),)))
    assert_only_the_odd_one_is_masked(steps(path, vocabulary, tmp_path), clean, named)


def test_pixels_that_are_not_numbers_never_reach_the_model(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd", lambda one: replace(one, images=(nan_tiff(),)))
    for batch in steps(path, vocabulary, tmp_path):
        assert all(bool(pack.pixel_values.isfinite().all()) for pack in batch.packs)


def test_an_empty_text_is_masked_and_named(
    clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "odd",
        lambda one: replace(one, query=(text_part(""),), target=(text_part(""),), meta={}),
    )
    assert_only_the_odd_one_is_masked(steps(path, vocabulary, tmp_path), clean, "text is empty")


@pytest.mark.parametrize("view", ["caption", "pair"])
def test_ten_megabytes_of_text_are_cut_and_cost_no_more_than_a_moment(
    view: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    text = (text_part("word and " * 1_200_000),)
    path = write(
        tmp_path / "odd",
        lambda one: (
            replace(one, query=text, positives=(text,), target=text, images=(), meta={})
            if view == "pair"
            else replace(one, query=text, target=text, meta={})
        ),
    )
    began = time.process_time()
    found = steps(path, vocabulary, tmp_path, view=view)
    # Encoding 10 MB takes 12 s; 64 KB of it, several times, well under one.
    assert time.process_time() - began < 6
    assert all(batch.num_truncated >= 1 for batch in found)
    assert all(batch.bad_records == () for batch in found)


def test_a_wrong_checksum_is_masked_and_named(
    clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd")
    file = path / "shard-00001.arrow"
    data = file.read_bytes()
    at = data.index(b"thing 5")
    file.write_bytes(data[:at] + b"thinG 5" + data[at + 7 :])
    assert_only_the_odd_one_is_masked(steps(path, vocabulary, tmp_path), clean, "wrong checksum")


@pytest.mark.parametrize(
    ("damage", "kind"), [("removed", "shard is missing"), ("cut", "shard is damaged")]
)
def test_a_shard_that_is_lost_during_training_masks_its_records(
    damage: str, kind: str, clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = write(tmp_path / "odd")
    monkeypatch.setattr("cocoa_dist.data.encoder.EXACT_BOUND_RECORDS", 0)  # nothing read before
    sizes = ShardReader.__init__

    def lose_a_shard(self: ShardReader, *arguments: Any, **options: Any) -> None:
        sizes(self, *arguments, **options)
        if lose_a_shard.opened:  # type: ignore[attr-defined]
            file = path / "shard-00001.arrow"
            file.unlink() if damage == "removed" else os.truncate(file, 700)
        lose_a_shard.opened = True  # type: ignore[attr-defined]

    lose_a_shard.opened = False  # type: ignore[attr-defined]
    monkeypatch.setattr(ShardReader, "__init__", lose_a_shard)
    found = steps(path, vocabulary, tmp_path)
    assert_only_the_odd_one_is_masked(found, clean, kind, numbers=(4, 5, 6, 7))


class Failing:
    """os.pread that fails now and then, or is slow."""

    def __init__(self, fails: Callable[[int], bool], seconds: float = 0.0) -> None:
        self.calls = 0
        self._fails, self._seconds, self._pread = fails, seconds, os.pread

    def __call__(self, descriptor: int, length: int, offset: int) -> bytes:
        self.calls += 1
        time.sleep(self._seconds)
        if self._fails(self.calls):
            raise OSError(5, "Input/output error")
        return self._pread(descriptor, length, offset)


@pytest.mark.parametrize(
    "failing",
    [Failing(lambda call: call % 3 != 0), Failing(lambda call: False, seconds=0.02)],
    ids=["failing", "slow"],
)
def test_a_store_that_fails_for_a_moment_is_waited_for(
    failing: Failing, clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(store, "LOCAL_PAUSES", (0.001, 0.001))
    path = write(tmp_path / "odd")
    monkeypatch.setattr(os, "pread", failing)
    found = steps(path, vocabulary, tmp_path)
    assert failing.calls >= 6
    for one, other in zip(found, clean, strict=True):
        assert (one.digest, one.num_tokens, one.bad_records) == (other.digest, other.num_tokens, ())


def test_a_store_that_fails_for_good_masks_and_is_not_waited_for_each_time(
    clean: list[StepBatch], vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoa_dist.data.encoder.EXACT_BOUND_RECORDS", 0)
    monkeypatch.setattr(store, "LOCAL_PAUSES", (0.2, 0.2))
    path = write(tmp_path / "odd")
    monkeypatch.setattr(os, "pread", Failing(lambda call: True))
    began = time.monotonic()
    found = steps(path, vocabulary, tmp_path)
    assert time.monotonic() - began < 3  # 24 records, each waited for: 10 s
    everything = tuple(range(NUM_RECORDS))
    assert_only_the_odd_one_is_masked(found, clean, "store fails", numbers=everything)
    assert {bad.key for bad in found[0].bad_records} == {"?"}


def test_a_store_that_fails_before_the_first_step_stops_the_rank(
    vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that read and ranks that do not would plan different packs."""
    monkeypatch.setattr(store, "LOCAL_PAUSES", ())
    path = write(tmp_path / "odd")
    monkeypatch.setattr(os, "pread", Failing(lambda call: True))
    with pytest.raises(OSError, match="Input/output error"):
        steps(path, vocabulary, tmp_path)


def test_the_bounds_of_a_lost_record_hold_its_mask(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A pack is planned from the index, whatever the record turns out to be."""
    path = write(tmp_path / "odd", lambda one: replace(one, images=(b"",)))
    for batch in steps(path, vocabulary, tmp_path, data={"tokens_per_pack": 90}):
        assert all(pack.num_tokens <= 90 for pack in batch.packs)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("s/shard-00000.arrow: batch 3 at byte 8 has 5 bytes, expected 9: the file was cut",
         "shard is damaged"),
        ("the record has no picture, expected one in its query", "no part for this view"),
        ("msc://p/b/shard-00000.arrow: RetryableError: timeout", "store fails"),
        ("something new", "other"),
    ],
)  # fmt: skip
def test_reasons_are_counted_by_kind(reason: str, kind: str) -> None:
    assert fault_kind(reason) == kind
