"""Tests of cocoa_dist.data.stored_json: whichever parser is there, values are those of json."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocoa_dist.data import stored_json
from cocoa_dist.data.stored_json import load_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_any_value_comes_back_with_its_type_and_order(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8
        data = json.dumps(value).encode()
    assert repr(load_json(data)) == repr(json.loads(data))  # tells 1 from 1.0, 0.0 from -0.0


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "1e400", '"\\ud800"', "[" * 2000 + "]" * 2000]
)
def test_what_a_fast_parser_refuses_is_left_to_json(text: str) -> None:
    try:
        expected = json.loads(text)
    except RecursionError:
        with pytest.raises(RecursionError):
            load_json(text.encode())
        return
    found = load_json(text.encode())
    assert found == expected or math.isnan(found)


@pytest.mark.parametrize("data", [b"", b"[1", b"[1] 2", b"\xff", b'{"a": }'])
def test_what_is_no_json_is_refused_as_json_does(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|Extra data|codec can't decode"):
        load_json(data)


def test_without_the_fast_parser_values_are_the_same() -> None:
    data = b'["a",1,-0.0,{"b":[null,true]}]'
    assert repr(stored_json._by_json(data)) == repr(load_json(data))
