"""Inputs of all sorts for whoever reads messages: random bytes, messages that nobody means, and valid ones bent.

All are made from the types of `wire` and its like, so a message that is added is fuzzed from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from msgspec import inspect

Strategy = st.SearchStrategy[Any]

INPUTS = int(os.environ.get("BASCULE_FUZZ_INPUTS", "300"))
"""Messages, frames and records of all tests together; `make fuzz` asks for many."""

WILD_INTS = (-(2**63), -(2**31) - 1, -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
LONG = (b"\xdd", b"\xdf", b"\xc6", b"\xdb")
"""Of a list, a map, bytes and text with a length of four bytes."""
DEEP = 200_000
"""Levels of nesting: more than any decoder's stack holds."""


def fuzzing(share: float, *, least: int = 20, shrink: bool = True) -> settings:
    """A test's share of all inputs, and at least so many. Nothing is kept, and no time is asserted.

    A process that has failed fails at all that it is sent then: there is nothing to `shrink`."""
    return settings(
        max_examples=max(least, round(INPUTS * share)),
        deadline=None,
        database=None,
        derandomize=INPUTS < 10_000,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * shrink,
        suppress_health_check=list(HealthCheck),
    )


class Made:
    """Builtin values that have a type's form, and of which nothing else is true."""

    def __init__(self, words: Sequence[str], known: Mapping[str, Strategy] = {}, *, wild: bool = False) -> None:
        """Strings are often one of `words`; a field that is named in `known` is often of its strategy. Where `wild`,
        numbers keep no bounds."""
        self._texts = st.one_of(st.sampled_from(list(words)), st.text(max_size=12))
        self._known = known
        self._wild = wild
        self._cache: dict[str, Strategy] = {}
        self._makers: dict[type[inspect.Type], Callable[[Any], Strategy]] = {
            inspect.IntType: self._int,
            inspect.FloatType: self._float,
            inspect.BoolType: lambda _: st.booleans(),
            inspect.NoneType: lambda _: st.none(),
            inspect.StrType: lambda _: self._texts,
            inspect.BytesType: self._bytes,
            inspect.EnumType: lambda kind: st.sampled_from([member.value for member in kind.cls]),
            inspect.VarTupleType: lambda kind: st.lists(self._of(kind.item_type), max_size=5),
            inspect.TupleType: lambda kind: st.tuples(*map(self._of, kind.item_types)).map(list),
            inspect.DictType: lambda kind: st.dictionaries(
                self._of(kind.key_type), self._of(kind.value_type), max_size=3
            ),
            inspect.UnionType: lambda kind: st.one_of(*map(self._of, kind.types)),
            inspect.StructType: self._struct,
        }

    def of(self, kind: Any) -> Strategy:
        """Values of a type, as `msgspec.to_builtins` would make them."""
        return self._of(inspect.type_info(kind))

    def _of(self, kind: inspect.Type) -> Strategy:
        key = repr(kind)
        if key not in self._cache:
            self._cache[key] = self._makers[type(kind)](kind)
        return self._cache[key]

    def _int(self, kind: inspect.IntType) -> Strategy:
        low, high = kind.ge if kind.ge is not None else -(2**63), kind.le if kind.le is not None else 2**64 - 1
        kept = [st.integers(max(low, 0), min(high, 40)), st.sampled_from(sorted({low, high})), st.integers(low, high)]
        loose = [st.sampled_from(WILD_INTS), st.integers(-(2**63), 2**64 - 1)]
        return st.one_of(*kept, *(loose if self._wild else ()))

    def _bytes(self, kind: inspect.BytesType) -> Strategy:
        if kind.max_length is not None and not self._wild:  # a salt: all of it, or none
            return st.one_of(st.just(b""), st.binary(min_size=kind.max_length, max_size=kind.max_length))
        return st.one_of(st.binary(max_size=48), st.binary(min_size=16, max_size=16))

    def _float(self, kind: inspect.FloatType) -> Strategy:
        if self._wild:
            return st.one_of(st.floats(), st.integers(-(2**63), 2**64 - 1))
        low, high = kind.gt if kind.gt is not None else kind.ge, kind.le
        return st.floats(low, high, exclude_min=kind.gt is not None)

    def _struct(self, kind: inspect.StructType) -> Strategy:
        fields = {field.encode_name: self._field(field) for field in kind.fields}
        if kind.array_like:
            return st.tuples(*fields.values()).map(list)
        if kind.tag_field is not None:
            fields[kind.tag_field] = st.just(kind.tag)
        return st.fixed_dictionaries(fields)

    def _field(self, field: inspect.Field) -> Strategy:
        made, known = self._of(field.type), self._known.get(field.encode_name)
        return made if known is None else st.one_of(known, known, known, made)


@st.composite
def bent(draw: st.DrawFn, values: Strategy) -> bytes:
    """A message as it should be encoded, with one or two things done to it on its way."""
    data = msgspec.msgpack.encode(draw(values))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = draw(st.integers(at, min(len(data), at + 16)))
        change = draw(st.sampled_from(["flip", "cut", "double", "lose", "other", "long"]))
        if change == "flip":
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :] if data else data
        elif change == "cut":
            data = data[:at]
        elif change == "double":
            data = data[:end] + data[at:]
        elif change == "lose":
            data = data[:at] + data[end:]
        elif change == "other":
            data = data[:at] + msgspec.msgpack.encode(draw(anything())) + data[end:]
        else:  # a header that promises far more than there is
            data = (
                data[:at]
                + draw(st.sampled_from([b"\xdd", b"\xdf", b"\xc6", b"\xdb"]))
                + b"\x7f\xff\xff\xff"
                + data[at:]
            )
    return data


def anything() -> Strategy:
    """Any value that MessagePack has."""
    numbers = st.one_of(st.sampled_from(WILD_INTS), st.floats())
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.binary(max_size=8))
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def nested(tag: str) -> bytes:
    """A message of that tag with a field that nobody knows, nested deeper than any stack."""
    head = msgspec.msgpack.encode({"type": tag, "x": None})[:-1]
    return head + b"\x91" * DEEP + b"\xc0"


def messages(words: Sequence[str], kind: Any, known: Mapping[str, Strategy] = {}) -> st.SearchStrategy[bytes]:
    """Encoded inputs for whoever reads messages of a type: nonsense, wild and bent ones, and most of all those that
    keep every bound and mean nothing."""
    kept, wild = Made(words, known).of(kind), Made(words, known, wild=True).of(kind)
    encoded = st.one_of(kept, kept, kept, wild, anything()).map(msgspec.msgpack.encode)
    return st.one_of(encoded, encoded, encoded, bent(kept), st.binary(max_size=200))


def tags_of(kind: Any) -> list[str]:
    """Of all structs in a union of messages."""
    info = inspect.type_info(kind)
    kinds = info.types if isinstance(info, inspect.UnionType) else (info,)
    return [str(each.tag) for each in kinds if isinstance(each, inspect.StructType)]
