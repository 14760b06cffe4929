"""What befalls whom, and when: drawn from a seed alone, so that the same seed gives the same list of faults."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from random import Random

SUSPECT_S, DEAD_S, LEASE_S = 1.5, 4.0, 3.0
"""What the router waits for heartbeats, and either side of a handoff for a sign of life."""
STEP_S, TOKEN_S = 0.012, 0.00015
"""What the mock engine takes for a step, and for each token of a prompt: 60 ms for 300 tokens."""


@dataclass(frozen=True)
class Layout:
    """How a cluster is set up."""

    policy: str
    transfer: str
    redis: bool = False
    disk: bool = False
    handoff: str = "push"
    key: bool = False
    """A cluster key: messages and KV over TCP are encrypted."""
    step_s: float = STEP_S
    token_s: float = TOKEN_S
    """Of the mock engine."""
    sequences: int = 64
    """That a worker computes at the same time."""

    @property
    def name(self) -> str:
        parts = [("redis", self.redis), ("disk", self.disk), ("cluster key", self.key)]
        there = [part for part, is_there in parts if is_there]
        return ", ".join([self.policy, f"KV over {self.transfer}", f"handoff {self.handoff}", *there])


LAYOUTS = (
    Layout("disaggregated", "tcp", redis=True),
    Layout("disaggregated", "shm"),
    Layout("adaptive", "tcp", redis=True, disk=True, key=True),
    Layout("disaggregated", "auto", redis=True, handoff="auto"),
    Layout("adaptive", "shm", disk=True),
)
"""A run's is that of its seed, in turn."""

ROLES = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode", "mixed-0": "mixed"}
_SENDERS = ("prefill-0", "prefill-1", "mixed-0")
_TAKERS = ("decode-0", "decode-1", "mixed-0")
_ALL = tuple(ROLES)
_TO_TAKERS = ("Prepare", "Written", "Commit", "Abort", "Renew")
_TO_SENDERS = ("Reserved", "Accepted", "HandoffRefused", "Revoked", "Fetched")


@dataclass(frozen=True)
class Fault:
    """One entry of the schedule. `order` is what the victim itself is told to do; without one the harness does it."""

    number: int
    gap_s: float
    """After the entry before it."""
    name: str
    victim: str
    seed: int
    seconds: float = 0.0
    order: str = ""
    what: str = ""
    for_good: bool = False


@dataclass(frozen=True)
class _Kind:
    weight: int
    victims: tuple[str, ...]
    seconds: tuple[float, float] = (0.0, 0.0)
    order: str = ""
    messages: tuple[str, ...] = ("",)
    for_good: bool = False


_WHOLE_POOL = "kill -9 of a whole pool"
_PROCESSES = {
    "kill -9": _Kind(10, _ALL, (0.0, 1.0)),
    _WHOLE_POOL: _Kind(2, ("prefill", "decode"), (0.0, 1.0)),
    "restart (SIGTERM)": _Kind(6, _ALL, (0.0, 0.5)),
    "paused, not missed": _Kind(6, _ALL, (0.1, 0.9)),
    "paused, suspect": _Kind(4, _ALL, (SUSPECT_S, DEAD_S - 0.7)),
    "paused, declared dead": _Kind(4, _ALL, (DEAD_S + 1.5, DEAD_S + 3.0)),
    "paused, replaced, woken": _Kind(5, _TAKERS, (0.2, 1.0)),
}
_TRANSFERS = {
    "connection cut": _Kind(9, _SENDERS, order="cut"),
    "frame flipped": _Kind(8, _SENDERS, order="flip"),
    "frame doubled": _Kind(4, _SENDERS, order="duplicate"),
    "frame shortened": _Kind(5, _SENDERS, order="truncate"),
    "paused in mid-write": _Kind(7, _SENDERS, (LEASE_S + 0.3, DEAD_S + 2.0), order="stop"),
    "answer garbled": _Kind(4, _ALL, order="garble"),
    "answer cut off": _Kind(4, _ALL, order="cut word"),
    "receiver stalls": _Kind(6, _TAKERS, (0.2, LEASE_S + 2.0), order="stall"),
}
_MESSAGES = {
    "Accepted lost": _Kind(4, _TAKERS, order="lose", messages=("Accepted",)),
    "Accepted lost for good": _Kind(3, _TAKERS, order="lose", messages=("Accepted",), for_good=True),
    "message to taker lost": _Kind(4, _SENDERS, order="lose", messages=_TO_TAKERS),
    "message to sender lost": _Kind(4, _TAKERS, order="lose", messages=_TO_SENDERS),
    "message doubled": _Kind(4, _ALL, order="repeat", messages=(*_TO_TAKERS, *_TO_SENDERS)),
    "message late": _Kind(4, _ALL, (0.05, 4.0), order="delay", messages=(*_TO_TAKERS, *_TO_SENDERS)),
}
_ENDING = (
    *("kill -9", "restart (SIGTERM)", "paused, declared dead"),
    *("paused, replaced, woken", "paused in mid-write"),
)
"""After these a process is gone, or may be."""
VETERANS = ("prefill-0", "decode-0", "mixed-0")
"""Workers that live for the whole of a soak, one of each role."""
_MEMORY = {"arena full": _Kind(8, _ALL, (0.5, 3.0), order="fill")}


def kinds_of(layout: Layout) -> dict[str, _Kind]:
    """The faults that a layout can have."""
    kinds = _PROCESSES | _TRANSFERS | _MESSAGES | _MEMORY
    if layout.transfer == "tcp":
        kinds["frames out of order"] = _Kind(5, _SENDERS, order="reorder")
    if layout.redis:
        kinds["Redis killed"] = _Kind(3, ("redis",), (0.5, 3.0))
        kinds["Redis paused"] = _Kind(3, ("redis",), (0.5, 3.0))
    if layout.disk:
        kinds["stored blocks damaged"] = _Kind(3, ("disk",))
    return kinds


def _sparing(veterans: Collection[str], kind: _Kind) -> _Kind:
    return replace(kind, victims=tuple(victim for victim in kind.victims if victim not in veterans))


def layout_of(seed: int) -> Layout:
    return LAYOUTS[seed % len(LAYOUTS)]


def paced(layout: Layout) -> Layout:
    """The same, but the workers can take so little that they, and not the cores, limit what can be asked."""
    return replace(layout, step_s=0.03, token_s=0.0003, sequences=8)


def schedule(seed: int, mean_gap_s: float, veterans: Collection[str] = ()) -> Iterator[Fault]:
    """Without end. `veterans` get no fault that may end a process."""
    kinds, draw, number = kinds_of(layout_of(seed)), Random(f"faults {seed}"), 0
    if veterans:
        kinds = {name: _sparing(veterans, kind) if name in _ENDING else kind for name, kind in kinds.items()}
        del kinds[_WHOLE_POOL]
    names = list(kinds)
    while True:
        number += 1
        [name] = draw.choices(names, [kind.weight for kind in kinds.values()])
        kind = kinds[name]
        yield Fault(
            number=number,
            gap_s=min(draw.expovariate(1 / mean_gap_s), 4 * mean_gap_s),
            name=name,
            victim=draw.choice(kind.victims),
            seed=draw.getrandbits(32),
            seconds=draw.uniform(*kind.seconds),
            order=kind.order,
            what=draw.choice(kind.messages),
            for_good=kind.for_good,
        )
