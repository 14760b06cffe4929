"""Requests to offer a server: seeded, so that two systems get the very same ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bascule.errors import ConfigError
from bascule.traffic.arrivals import Arrivals

VOCABULARY = range(1000, 40_000)
"""Token ids that random text is made of."""

Span = tuple[int, int]
"""Lengths in tokens, drawn uniformly; the spread keeps closed-loop clients out of lockstep."""


@dataclass(frozen=True)
class Kind:
    """One kind of request: its share of ten, and lengths in tokens."""

    share: int
    prompt: Span
    output: Span
    tenants: int = 0
    """Of so many system prompts of `shared` tokens each, one stands before the prompt."""
    shared: int = 0
    turns: int = 1
    """Turns of a conversation; each repeats all that was said before."""


WORKLOADS: dict[str, tuple[Kind, ...]] = {
    "chat": (Kind(10, (96, 160), (80, 112)),),
    "summarise": (Kind(10, (1350, 1650), (24, 40)),),
    "mixed": (Kind(7, (96, 160), (80, 112)), Kind(3, (1350, 1650), (24, 40))),
    "shared-prefix": (Kind(10, (80, 120), (56, 72), tenants=4, shared=600),),
    "multi-turn": (Kind(10, (160, 240), (64, 96), turns=6),),
}


@dataclass(frozen=True)
class Ask:
    """One request: the tokens that are new in it, and how many are wanted back."""

    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Talk:
    """Requests of one client, one after the other; with several, each repeats those before and their answers."""

    asks: tuple[Ask, ...]
    at: float | None = None
    """Seconds after the start when it begins; None for as soon as a client is free."""


def talks(
    name: str,
    requests: int,
    seed: int,
    rate: Arrivals | float | None = None,
    vocabulary: range = VOCABULARY,
    kinds: Sequence[Kind] = (),
) -> list[Talk]:
    """About `requests` requests (whole conversations) of a workload, the first of `all_talks`."""
    made: list[Talk] = []
    count = 0
    for talk in all_talks(name, seed, rate, vocabulary, kinds):
        if count >= requests:
            break
        made.append(talk)
        count += len(talk.asks)
    return made


def all_talks(
    name: str,
    seed: int,
    rate: Arrivals | float | None = None,
    vocabulary: range = VOCABULARY,
    kinds: Sequence[Kind] = (),
) -> Iterator[Talk]:
    """Conversations of a workload without end; with `rate` (requests/s) Poisson arrivals, or those given. `kinds`: of
    which the workload is to be, if not its own.

    Raises ConfigError for an unknown workload, or a rate that is not above 0.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r} is not known; there are {', '.join(WORKLOADS)}")
    times: Iterator[float] | None = None
    if rate is not None:
        arrivals = rate if isinstance(rate, Arrivals) else Arrivals(rate)
        times = arrivals.slower(_turns(kinds or WORKLOADS[name])).times(_rng(name, seed, "arrivals"))
    return _dealt(name, kinds or WORKLOADS[name], seed, times, vocabulary)


def _dealt(
    name: str, kinds: Sequence[Kind], seed: int, times: Iterator[float] | None, vocabulary: range
) -> Iterator[Talk]:
    rng = _rng(name, seed)
    count, deck = 0, list[Kind]()
    while True:
        if not deck:
            deck = [kind for kind in kinds for _ in range(kind.share)]
            rng.shuffle(deck)
        kind = deck.pop()
        drawn = _Drawn(name, seed, kind, rng, vocabulary)
        asks = tuple(drawn.ask(count + turn, first=turn == 0) for turn in range(kind.turns))
        yield Talk(asks, None if times is None else next(times))
        count += kind.turns


def _turns(kinds: Sequence[Kind]) -> float:
    """Requests of a talk, on average."""
    return sum(kind.share * kind.turns for kind in kinds) / sum(kind.share for kind in kinds)


@dataclass(frozen=True)
class _Drawn:
    """Requests of one kind; `rng` gives the lengths, and the tokens follow from where a request stands."""

    name: str
    seed: int
    kind: Kind
    rng: random.Random
    vocabulary: range

    def ask(self, number: int, *, first: bool) -> Ask:
        prompt: list[int] = []
        if self.kind.tenants and first:
            prompt += self._tokens(self.kind.shared, "shared", self.rng.randrange(self.kind.tenants))
        prompt += self._tokens(self.rng.randint(*self.kind.prompt), "own", number)
        return Ask(tuple(prompt), self.rng.randint(*self.kind.output))

    def _tokens(self, count: int, *key: object) -> Sequence[int]:
        return _rng(self.name, self.seed, *key).choices(self.vocabulary, k=count)


def _rng(*key: object) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))
