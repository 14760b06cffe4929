"""Requests to offer a server: seeded, so that two systems get the very same ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bascule.errors import ConfigError

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


def talks(name: str, requests: int, seed: int, rate: float | None = None) -> list[Talk]:
    """About `requests` requests (whole conversations) of a workload; with `rate` (requests/s), Poisson arrivals.

    Raises ConfigError for an unknown workload.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r} is not known; there are {', '.join(WORKLOADS)}")
    rng = _rng(name, seed)
    arrivals = _rng(name, seed, "arrivals")
    made: list[Talk] = []
    count, at, deck = 0, 0.0, list[Kind]()
    while count < requests:
        if not deck:
            deck = [kind for kind in WORKLOADS[name] for _ in range(kind.share)]
            rng.shuffle(deck)
        kind = deck.pop()
        asks = tuple(_ask(name, seed, kind, rng, count + turn, first=turn == 0) for turn in range(kind.turns))
        if rate is not None:
            at += arrivals.expovariate(rate / kind.turns)
        made.append(Talk(asks, None if rate is None else at))
        count += kind.turns
    return made


def _ask(name: str, seed: int, kind: Kind, rng: random.Random, number: int, *, first: bool) -> Ask:
    prompt: list[int] = []
    if kind.tenants and first:
        prompt += _tokens(_rng(name, seed, "shared", rng.randrange(kind.tenants)), kind.shared)
    prompt += _tokens(_rng(name, seed, "own", number), rng.randint(*kind.prompt))
    return Ask(tuple(prompt), rng.randint(*kind.output))


def _tokens(rng: random.Random, count: int) -> Sequence[int]:
    return rng.choices(VOCABULARY, k=count)


def _rng(*key: object) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))
