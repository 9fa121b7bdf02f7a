"""Records: what they refuse, how they become rows and come back, what their checksum covers."""

import dataclasses
import hashlib
import pickle
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoa_dist.data.records import (
    Part,
    Record,
    content_hash,
    from_row,
    image_part,
    joined_header,
    record_crc32,
    record_header,
    stored_crc32,
    text_part,
    to_row,
    trusted_record,
)


def make_record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": "k1",
        "task": "caption",
        "query": (text_part("what is it?"), image_part(1)),
        "positives": ((text_part("a cat"), image_part(0)), (text_part("cat"),)),
        "negatives": ((text_part("a dog"),),),
        "target": (text_part("a cat: animal"),),
        "images": (b"first picture", b"second picture"),
        "meta": {"source": "test", "size": [1, 2.5, None, True], "nested": {"ä": "日本"}},
    }
    return Record(**{**values, **changes})


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    images = tuple(draw(st.lists(st.binary(max_size=30), max_size=3)))
    part = texts.map(text_part)
    if images:
        part |= st.integers(0, len(images) - 1).map(image_part)
    side = st.lists(part, min_size=1, max_size=3).map(tuple)
    sides = st.lists(side, max_size=3).map(tuple)
    return Record(
        key=draw(texts.filter(bool)),
        task=draw(texts.filter(bool)),
        query=draw(side),
        positives=draw(sides),
        negatives=draw(sides),
        target=draw(st.just(()) | side),
        images=images,
        identity=draw(texts),
        meta=draw(st.dictionaries(texts, st.integers() | texts, max_size=3)),
    )


@settings(max_examples=100, deadline=None)
@given(records())
def test_a_row_gives_back_the_record(record: Record) -> None:
    row = to_row(record)
    assert from_row(row) == record
    assert row["crc32"] == record_crc32(from_row(row))


@settings(max_examples=100, deadline=None)
@given(records())
def test_a_header_and_pictures_give_back_the_record(record: Record) -> None:
    row, pictures = to_row(record), b"".join(record.images)
    header = joined_header(row["header"].encode(), row["meta"].encode())
    assert header == record_header(record)
    assert stored_crc32(header, pictures) == record_crc32(record) == row["crc32"]
    again = trusted_record(header, pictures)
    assert again == record
    assert again.images == record.images
    assert pickle.loads(pickle.dumps(again)) == record


CHANGES: dict[str, dict[str, Any]] = {
    "key": {"key": "k2"},
    "task": {"task": "other"},
    "query_text": {"query": (text_part("what is it"), image_part(1))},
    "query_image": {"query": (text_part("what is it?"), image_part(0))},
    "positive_order": {"positives": ((text_part("cat"),), (text_part("a cat"), image_part(0)))},
    "positive_to_negative": {
        "positives": ((text_part("a cat"), image_part(0)),),
        "negatives": ((text_part("cat"),), (text_part("a dog"),)),
    },
    "side_border": {
        "positives": ((text_part("a cat"),), (image_part(0), text_part("cat"))),
    },
    "target": {"target": (text_part("a cat: animals"),)},
    "image_byte": {"images": (b"first picture", b"second picturE")},
    "image_border": {"images": (b"first pictures", b"econd picture")},
    "identity": {"identity": "cat"},
    "meta": {"meta": {"source": "test "}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_checksum_covers(change: dict[str, Any]) -> None:
    assert record_crc32(make_record(**{"identity": "i", **change})) != record_crc32(
        make_record(identity="i")
    )


def test_the_checksum_is_that_of_zlib() -> None:
    """Whichever implementation is installed: data sets move between machines."""
    record = make_record()
    expected = zlib.crc32(record_header(record) + b"".join(record.images))
    assert record_crc32(record) == expected == 3958747206


def test_the_checksum_does_not_depend_on_the_order_of_meta() -> None:
    forward, backward = make_record(meta={"a": 1, "b": 2}), make_record(meta={"b": 2, "a": 1})
    assert record_crc32(forward) == record_crc32(backward)


def test_identity_is_the_content_of_the_first_positive() -> None:
    record = make_record()
    expected = hashlib.sha1(b"text:5:a catimage:13:first picture").hexdigest()
    assert record.identity == content_hash(record) == expected
    same_positive = make_record(key="k9", query=(text_part("another query"),), negatives=())
    assert same_positive.identity == record.identity
    other_picture = make_record(images=(b"first_picture", b"second picture"))
    assert other_picture.identity != record.identity


def test_a_given_identity_is_kept() -> None:
    assert make_record(identity="1F600").identity == "1F600"


def test_identity_falls_back_to_target_then_query() -> None:
    query, target = (text_part("q"),), (text_part("t"),)
    assert Record(key="a", task="t", query=query, target=target).identity == content_hash(
        Record(key="b", task="t", query=target)
    )


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_record().key = "other"  # type: ignore[misc]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty_key": ({"key": ""}, "key is ''"),
    "key_is_a_number": ({"key": 7}, "key is 7"),
    "long_key": ({"key": "k" * 1025}, "1025 bytes"),
    "empty_task": ({"task": ""}, "'k1': task is ''"),
    "identity_is_none": ({"identity": None}, "identity is None"),
    "empty_query": ({"query": ()}, "'k1': query is empty"),
    "empty_positive": ({"positives": ((),)}, r"positives\[0\] is empty"),
    "empty_negative": ({"negatives": ((text_part("x"),), ())}, r"negatives\[1\] is empty"),
    "image_out_of_range": (
        {"target": (image_part(2),)},
        r"target\[0\] is image 2, the record has 2 images",
    ),
    "negative_image": ({"target": (image_part(-1),)}, r"target\[0\] is image -1"),
    "image_is_no_bytes": ({"images": ("a.png", b"")}, r"images\[0\] is str, expected bytes"),
    "meta_with_tuple": ({"meta": {"size": (1, 2)}}, "meta changes when it is stored as JSON"),
    "meta_with_number_key": ({"meta": {1: 2}}, "meta changes when it is stored as JSON"),
    "meta_with_nan": ({"meta": {"x": float("nan")}}, "meta is not JSON"),
    "meta_with_infinity": ({"meta": {"x": [float("inf")]}}, "meta is not JSON"),
    "half_a_surrogate_in_key": ({"key": "a\ud800"}, "key .* holds half a surrogate pair"),
    "half_a_surrogate_in_meta": ({"meta": {"x": "\udfff"}}, "meta is not JSON"),
    "meta_with_bytes": ({"meta": {"x": b"1"}}, "meta is not JSON"),
    "meta_is_a_list": ({"meta": [1]}, "expected a dict"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_bad_record_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_record(**change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "text", "text": "a\ud800"}, "half a surrogate pair"),
        ({"kind": "video"}, "part kind 'video' is unknown"),
        ({"kind": "text", "image": 0}, "a text part has image 0"),
        ({"kind": "image", "text": "cat", "image": 0}, "an image part has text 'cat'"),
    ],
)
def test_a_bad_part_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Part(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": "{"}, "'k1' is not a record"),
        ({"query": None}, "'k1' is not a record"),
        ({"query": [{"kind": "text", "text": "x"}]}, "'k1': column 'image' is missing"),
        ({"target": [{"kind": "sound", "text": "", "image": -1}]}, "part kind 'sound'"),
    ],
)
def test_a_bad_row_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_row({**to_row(make_record()), **change})


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(texts, json_values, max_size=3))
def test_any_json_meta_comes_back(meta: dict[str, Any]) -> None:
    assert from_row(to_row(make_record(meta=meta))).meta == meta
