"""Reads a JSON object field by field, refusing wrong types and ranges with the field's own name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from bascule.errors import InvalidRequest

Default = TypeVar("Default")

_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def type_name(value: object) -> str:
    """What JSON calls a value, with its article: `a string`, `an integer`."""
    return _NAMES.get(type(value), "something else")


def wrong_type(param: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {wanted}, not {type_name(value)}.", param=param, code="invalid_type")


def wrong_value(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{param} {message}", param=param, code="invalid_value")


def check_integer(param: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`value` if it is an integer (a boolean is none) within `low .. high`, both included."""
    if type(value) is not int:
        raise wrong_type(param, "an integer", value)
    if (low is not None and value < low) or (high is not None and value > high):
        raise wrong_value(param, f"must be {_range(low, high)}, not {_short(value)}.")
    return value


def check_number(
    param: str, value: object, low: float = -math.inf, high: float = math.inf, *, above_low: bool = False
) -> float:
    """`value` as a float if it is a number within `low .. high`; with `above_low`, `low` itself is refused too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(param, "a number", value)
    if not low <= value <= high or (above_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above_low else _range(low, high)
        raise wrong_value(param, f"must be {bounds}, not {_short(value)}.")
    return float(value)


def check_text(param: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    return value


class Fields:
    """One JSON object under examination. `null` counts as absent; what nobody asked for is reported by `unknown`."""

    def __init__(self, body: dict[str, object], prefix: str = "") -> None:
        self._body = body
        self._prefix = prefix
        self._asked: set[str] = set()

    def param(self, name: str) -> str:
        """The field's full name, as error messages give it: `stream_options.include_usage`."""
        return self._prefix + name

    def value(self, name: str, harmless: Sequence[object] | None = None) -> object | None:
        """The raw value; None where the field is absent or null. All but `harmless` ones, if given, are refused by the
        caller, and no document lists them."""
        self._asked.add(name)
        return self._body.get(name)

    def boolean(self, name: str) -> bool:
        """A boolean that is false unless given."""
        value = self.value(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise wrong_type(self.param(name), "a boolean", value)
        return value

    def integer(self, name: str, default: Default, low: int | None = None, high: int | None = None) -> int | Default:
        value = self.value(name)
        return default if value is None else check_integer(self.param(name), value, low, high)

    def number(
        self, name: str, default: Default, low: float, high: float, *, above_low: bool = False
    ) -> float | Default:
        value = self.value(name)
        return default if value is None else check_number(self.param(name), value, low, high, above_low=above_low)

    def text(self, name: str, default: Default) -> str | Default:
        value = self.value(name)
        return default if value is None else check_text(self.param(name), value)

    def items(self, name: str) -> list[object] | None:
        """A list with anything in it."""
        value = self.value(name)
        if value is None or isinstance(value, list):
            return value
        raise wrong_type(self.param(name), "a list", value)

    def object(self, name: str) -> dict[str, object] | None:
        value = self.value(name)
        if value is None or isinstance(value, dict):
            return value
        raise wrong_type(self.param(name), "an object", value)

    def nested(self, name: str) -> Fields | None:
        """The fields of an object in this one."""
        value = self.object(name)
        return None if value is None else Fields(value, f"{self.param(name)}.")

    def unknown(self) -> list[str]:
        """The names in the object that were never asked for."""
        return sorted(self._body.keys() - self._asked)

    def forget(self) -> None:
        """All has been read; let the object go, whoever still has this."""
        self._body = {}


def _range(low: float | None, high: float | None) -> str:
    if high is None or high == math.inf:
        return f"at least {low}"
    if low is None or low == -math.inf:
        return f"at most {high}"
    return f"from {low} to {high}"


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
