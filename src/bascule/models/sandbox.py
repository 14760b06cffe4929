"""Where chat templates run: they reach nothing outside, change nothing, and end.

jinja2's immutable sandbox keeps attributes and mutable arguments out of reach. It bounds `range`, but not what loops in
loops, macros that call themselves, or repeated texts take; a model's files must not stop the server with those. So each
pass of a loop and each call looks at the clock, and what makes texts or lists longer is measured before it is made.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 5.0
"""Of CPU time, for one rendering; a conversation of a thousand messages takes some hundredths."""
MOST_LENGTH = 32 << 20
"""Characters of a text, or entries of a list, that a template makes."""
_MOST_NUMBER = 100_000
"""Of a number given to a filter or to a method of a text: it may be a width."""
_MOST_BITS = 4096
"""Of a number that a template makes."""

_end: ContextVar[float] = ContextVar("end")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with bounds, beyond which it raises SecurityError, a TemplateError. Render within `clock`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.globals["lipsum"]
        for name, apply in self.filters.items():
            self.filters[name] = _measured_filter(name, apply)
        self.filters |= {"_passes": _passes, "_joined": lambda values: self.concat(map(str, values))}

    @staticmethod
    def concat(texts: Iterable[str]) -> str:
        """What a template, a macro or a block has written."""
        parts, length = [], 0
        for text in texts:
            length += len(text)
            _check_length(length)
            parts.append(text)
        return "".join(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _through("_passes", loop.iter)
        _measure_joins(tree)
        return tree

    def call(self, context: Context, called: Any, /, *given: Any, **named: Any) -> Any:
        """Every call of a template: of macros, functions and methods."""
        _look_at_the_clock()
        method = getattr(called, "__wrapped__", called)  # jinja2 has its own around str.format
        if isinstance(owner := getattr(method, "__self__", None), str):
            _measure(method.__name__, owner, (*given, *named.values()))
        return super().call(context, called, *given, **named)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Every `+`, `*`, `**` and `%` of a template."""
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_length(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _measure("format", left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, Sized) and isinstance(times, int):
                    _check_length(len(many) * times)
            _check_bits(_bits(left) + _bits(right))
        elif operator == "**":
            _check_bits(_bits(left) * abs(right) if isinstance(right, int) else 0)
        return super().call_binop(context, operator, left, right)


@contextmanager
def clock() -> Iterator[None]:
    """One rendering, with all its time before it."""
    token = _end.set(time.thread_time() + MOST_SECONDS)
    try:
        yield
    finally:
        _end.reset(token)


def _look_at_the_clock() -> None:
    if time.thread_time() > _end.get():
        raise SecurityError(f"it takes more than {MOST_SECONDS:g} s of computing")


@pass_context  # which keeps jinja2 from applying it when it compiles
def _passes(_context: Context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _look_at_the_clock()
        yield value


def _through(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _measure_joins(node: nodes.Node) -> None:
    """Make a filter of each `a ~ b` below a node."""
    for name, value in node.iter_fields():
        several = value if isinstance(value, list) else [value]
        for place, each in enumerate(several):
            if isinstance(each, nodes.Node):
                _measure_joins(each)
            if isinstance(each, nodes.Concat):
                several[place] = _through("_joined", nodes.List(each.nodes, lineno=each.lineno))
        if not isinstance(value, list):
            setattr(node, name, several[0])


def _measured_filter(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    hidden = 1 if hasattr(apply, "jinja_pass_arg") else 0

    @functools.wraps(apply)
    def measured(*given: Any, **named: Any) -> Any:
        value, *rest = given[hidden:] or (None,)
        if isinstance(value, str | int | float):
            _measure(name, str(value), (*rest, *named.values()))
        elif name == "join" and rest and isinstance(value, Sized):
            _check_length(len(value) * len(str(rest[0])))
        return apply(*given, **named)

    return measured


def _measure(name: str, text: str, given: tuple[Any, ...]) -> None:
    """What the method or filter `name` of a text would make; raises SecurityError for too much."""
    numbers = [each for each in given if isinstance(each, int)]
    if any(abs(number) > _MOST_NUMBER for number in numbers):
        raise SecurityError(f"{max(numbers, key=abs)} is too large for {name}")
    if name in ("format", "format_map", "translate"):
        if name != "format" or "*" in text or any(len(run) > 4 for run in _digit_runs(text)):
            raise SecurityError(f"{name} could make a text of any length")
        _check_length((text.count("%") + text.count("{")) * (10_000 + sum(len(str(each)) for each in given)))
    elif name == "replace" and len(given) >= 2:
        _check_length(len(text) + text.count(str(given[0])) * len(str(given[1])))
    elif name == "join" and given and isinstance(given[0], Sized):
        _check_length(len(given[0]) * len(text))
    elif name in ("indent", "expandtabs"):
        _check_length(len(text) * max([1, *numbers]))


def _digit_runs(text: str) -> list[str]:
    return "".join(sign if sign.isdigit() else " " for sign in text).split()


def _check_length(length: int) -> None:
    if length > MOST_LENGTH:
        raise SecurityError(f"it makes more than {MOST_LENGTH} characters or entries at once")


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise SecurityError(f"it makes a number of more than {_MOST_BITS} bits")
