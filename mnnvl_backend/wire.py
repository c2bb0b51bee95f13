"""Objects as bytes, for ranks that meet in a store. Not pickle: whoever can write to a store must not be able to run
code in the ranks that read it."""

from __future__ import annotations

import json
import numbers
from typing import Any


def dumps(value: Any) -> bytes:
    """
    Raises:
        TypeError: neither None, bool, int (or numpy's), float, str, bytes, nor tuples, lists or dicts (of str) of them.
    """
    return json.dumps(_tagged(value)).encode()


def loads(data: bytes) -> Any:
    """
    Raises:
        ValueError: bytes that dumps() doesn't give.
    """
    try:
        return json.loads(data, object_hook=_untagged)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _tagged(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, tuple):
        return {"tuple": [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _tagged(item)] for key, item in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral):  # numpy's
        return int(value)
    raise TypeError(f"allgather: expected numbers, text, bytes, or tuples, lists and dicts of them, got {value!r}")


def _untagged(tagged: dict[str, Any]) -> Any:
    match list(tagged.items()):
        case [("bytes", str(text))]:
            return bytes.fromhex(text)
        case [("tuple", list(items))]:
            return tuple(items)
        case [("dict", list(items))] if all(
            isinstance(i, list) and len(i) == 2 and isinstance(i[0], str) for i in items
        ):
            return dict(items)
    raise ValueError(f"unknown object with {', '.join(tagged)[:80] or 'nothing'}")
