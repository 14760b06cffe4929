"""What could be built: architectures with their pools, as far as a budget goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from msgspec import Struct
from msgspec.structs import replace

from bascule.planning.classes import WorkerClass
from bascule.types import Role

ARCHITECTURES = ("single", "replicated", "adaptive", "disaggregated")
"""The simplest first: of equals the first is taken."""
_ALL_COUNTS = 16
_GROWTH = 1.15
"""Up to so many workers of a pool every number is looked at, then each this many times the one before."""


class Share(Struct, frozen=True):
    """One pool."""

    role: Role
    of: WorkerClass
    count: int

    def __str__(self) -> str:
        return f"{self.count} {self.role} x {self.of.name}"


class Candidate(Struct, frozen=True):
    """One architecture with its pools."""

    architecture: str
    shares: tuple[Share, ...]
    by_price: bool = True
    """Whether candidates are compared by price: not where any class has none, as devices are no money."""

    def __str__(self) -> str:
        return f"{self.architecture} ({', '.join(map(str, self.shares))})"

    @property
    def devices(self) -> int:
        return sum(share.count * share.of.devices for share in self.shares)

    @property
    def workers(self) -> int:
        return sum(share.count for share in self.shares)

    @property
    def price(self) -> float | None:
        """An hour of all workers; None where a class has no price."""
        prices = [share.of.price_per_hour for share in self.shares]
        counts = [share.count for share in self.shares]
        if any(price is None for price in prices):
            return None
        return sum(count * (price or 0.0) for count, price in zip(counts, prices, strict=True))

    @property
    def money(self) -> float:
        """What candidates are compared by: their price, or their devices where a class has none."""
        return float(self.devices) if self.price is None or not self.by_price else self.price

    @property
    def family(self) -> tuple[str, ...]:
        """What it is but for the counts."""
        return (self.architecture, *(f"{share.role} {share.of.name}" for share in self.shares))

    @property
    def splits(self) -> bool:
        return self.architecture == "disaggregated"

    def with_classes(self, classes: dict[str, WorkerClass]) -> Candidate:
        """The same of other classes, by their names."""
        return replace(self, shares=tuple(replace(share, of=classes[share.of.name]) for share in self.shares))

    def within(self, other: Candidate) -> bool:
        """Whether `other` is this and more."""
        return self.family == other.family and all(
            mine.count <= theirs.count for mine, theirs in zip(self.shares, other.shares, strict=True)
        )


class Budget(Struct, frozen=True, kw_only=True):
    """What may be spent; None for no bound."""

    devices: int | None = None
    per_hour: float | None = None

    def holds(self, candidate: Candidate) -> bool:
        if self.devices is not None and candidate.devices > self.devices:
            return False
        return self.per_hour is None or (candidate.price or 0.0) <= self.per_hour * (1 + 1e-9)

    def of(self, one: WorkerClass) -> int:
        """How many workers of a class it holds."""
        limits = []
        if self.devices is not None:
            limits.append(self.devices // one.devices)
        if self.per_hour is not None and one.price_per_hour:
            limits.append(int(self.per_hour * (1 + 1e-9) / one.price_per_hour))
        return min(limits, default=0)

    def times(self, factor: float) -> Budget:
        return Budget(
            devices=None if self.devices is None else int(self.devices * factor),
            per_hour=None if self.per_hour is None else self.per_hour * factor,
        )

    def __str__(self) -> str:
        parts = []
        if self.devices is not None:
            parts.append(f"{self.devices} device{'s' * (self.devices != 1)}")
        if self.per_hour is not None:
            parts.append(f"{self.per_hour:g} an hour")
        return " and ".join(parts)


def candidates(classes: Sequence[WorkerClass], budget: Budget, architectures: Sequence[str]) -> list[Candidate]:
    """All that the budget holds."""
    priced = all(one.price_per_hour is not None for one in classes)
    every = (one for name in architectures for one in _of(name, classes, budget) if budget.holds(one))
    return [one if priced else replace(one, by_price=False) for one in every]


def largest(found: Sequence[Candidate]) -> list[Candidate]:
    """Those to which nothing can be added."""
    by_family: dict[tuple[str, ...], list[Candidate]] = {}
    for one in found:
        by_family.setdefault(one.family, []).append(one)
    return [
        one
        for family in by_family.values()
        for one in family
        if not any(one.within(other) for other in family if other is not one)
    ]


def _of(architecture: str, classes: Sequence[WorkerClass], budget: Budget) -> Iterator[Candidate]:
    if architecture == "single":
        for one in classes:
            yield Candidate(architecture, (Share(Role.MIXED, one, 1),))
        return
    if architecture != "disaggregated":
        for one in classes:
            for count in _counts(budget.of(one)):
                if count > 1:
                    yield Candidate(architecture, (Share(Role.MIXED, one, count),))
    if architecture == "replicated":
        return
    for first, second in product(classes, repeat=2):
        for prefill in _counts(budget.of(first)):
            for decode in _counts(budget.of(second)):
                yield Candidate(architecture, (Share(Role.PREFILL, first, prefill), Share(Role.DECODE, second, decode)))


def _counts(most: int) -> Iterator[int]:
    count = 1
    while count < most:
        yield count
        count = count + 1 if count < _ALL_COUNTS else int(count * _GROWTH)
    if most >= 1:
        yield most
