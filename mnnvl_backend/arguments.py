"""Checks of arguments that users pass: TypeError for a wrong type, ValueError for a wrong value, both in the form
"name: expected ..., got ...". All are pure, so that a refused call has set up and sent nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch

MAX_SHOWN = 80  # characters of a value in an error; some are whole tensors


def represented(value: object) -> str:
    """A value's repr, shortened, whatever the repr does. Not a tensor's, which reads memory that may be gone."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {_shape(value)} and {value.dtype}"
    try:
        text = repr(value)
    except Exception as error:  # a half-built object of somebody else's
        text = f"<no repr: {error}>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _shape(tensor: torch.Tensor) -> object:
    return "(nested)" if tensor.is_nested else tuple(tensor.shape)


def shown(value: object) -> str:
    """A value as errors of its type show it: with the type."""
    text = represented(value)
    return (
        text if isinstance(value, torch.Tensor) or type(value).__name__ in text else f"{text} ({type(value).__name__})"
    )


def wrong_type(name: str, expected: str, value: object) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {shown(value)}")


def wrong_value(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {represented(value)}")


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
        except Exception:  # somebody else's
            raise wrong_type(name, wanted, value) from None
    if value < least or (most is not None and value > most):
        raise wrong_value(name, wanted, value)
    return value  # type: ignore[no-any-return]


def at_most(name: str, value: int, most: int) -> int:
    """An integer() whose errors name its lower bound only.

    Raises:
        ValueError: more than `most`.
    """
    if value > most:
        raise wrong_value(name, f"at most {most}", value)
    return value


def code(name: str, value: Any, codes: tuple[int, ...], expected: str) -> int:
    """One of some integers.

    Raises:
        ValueError: anything else.
    """
    try:
        number = integer(name, value, min(codes), max(codes))
    except (TypeError, ValueError):
        raise wrong_value(name, expected, value) from None
    if number not in codes:
        raise wrong_value(name, expected, value)
    return number


def number(name: str, value: Any, expected: str) -> float:
    """
    Raises:
        TypeError: neither a float nor an int. ValueError: an int that no float can hold.
    """
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        raise wrong_type(name, expected, value)
    try:
        return float(value)
    except OverflowError:
        raise wrong_value(name, expected, value) from None


def instance(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """
    Raises:
        TypeError: `value` isn't of `kind`, which the error calls `expected`.
    """
    if not isinstance(value, kind):
        raise wrong_type(name, expected, value)
