"""JSON of stored records, parsed by the fastest implementation at hand."""

import json
from collections.abc import Callable
from typing import Any

__all__ = ["load_json"]


def _by_json(data: bytes) -> Any:
    return json.loads(data.decode())


def _faster(data: bytes) -> Any:
    """Leave to json what msgspec refuses: NaN, half a surrogate pair, numbers beyond float64."""
    try:
        return _decode(data)
    except (DecodeError, RecursionError):
        return _by_json(data)


# UTF-8 JSON -> its values; raises ValueError for what is none, as json does
load_json: Callable[[bytes], Any] = _by_json
try:  # the same values in half the time; not on every platform
    from msgspec import DecodeError
    from msgspec.json import Decoder
except ImportError:
    pass
else:
    _decode = Decoder().decode
    load_json = _faster
