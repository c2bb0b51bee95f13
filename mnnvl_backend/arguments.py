"""Checks of arguments that users pass: TypeError for a wrong type, ValueError for a wrong value, both in the form
"name: expected ..., got ...". All are pure, so that a refused call has set up and sent nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch

MAX_SHOWN = 80  # characters of a value in an error; some are whole tensors


def shown(value: object) -> str:
    """A value as errors show it: its repr and type, shortened, whatever the repr does."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    try:
        text = repr(value)
    except Exception as error:  # a half-built object of somebody else's
        text = f"<no repr: {error}>"
    if len(text) > MAX_SHOWN:
        text = text[: MAX_SHOWN - 3] + "..."
    return text if type(value).__name__ in text else f"{text} ({type(value).__name__})"


def wrong_type(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {shown(value)}")


def wrong_value(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {value!r}")


def integer(name: str, value: Any, least: int, most: int | None = None, unit: str = "") -> int:
    """`value` as an int. Integers of other libraries are taken (numpy's, torch.SymInt); bool, float and tensors aren't.

    Raises:
        TypeError: not an integer. ValueError: less than `least`, or more than `most`.
    """
    unit = f" {unit}" if unit else ""
    wanted = f"an integer of at least {least}{unit}" if most is None else f"an integer from {least} to {most}{unit}"
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        if isinstance(value, (bool, torch.Tensor)) or not hasattr(type(value), "__index__"):
            raise wrong_type(name, wanted, value)
        try:
            value = operator.index(value)
        except TypeError:
            raise wrong_type(name, wanted, value) from None
    if value < least or (most is not None and value > most):
        raise wrong_value(name, wanted, value)
    return value  # type: ignore[no-any-return]


def instance(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """
    Raises:
        TypeError: `value` isn't of `kind`, which the error calls `expected`.
    """
    if not isinstance(value, kind):
        raise wrong_type(name, expected, value)
