"""What befalls whom, and when: drawn from a seed alone, so that the same seed gives the same list of faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

SUSPECT_S, DEAD_S, LEASE_S = 1.5, 4.0, 3.0
"""What the router waits for heartbeats, and either side of a handoff for a sign of life."""


@dataclass(frozen=True)
class Layout:
    """How a cluster is set up."""

    policy: str
    transfer: str
    redis: bool = False
    disk: bool = False
    handoff: str = "push"

    @property
    def name(self) -> str:
        tiers = [tier for tier, there in (("redis", self.redis), ("disk", self.disk)) if there]
        return ", ".join([self.policy, f"KV over {self.transfer}", f"handoff {self.handoff}", *tiers])


LAYOUTS = (
    Layout("disaggregated", "tcp", redis=True),
    Layout("disaggregated", "shm"),
    Layout("adaptive", "tcp", redis=True, disk=True),
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


_PROCESSES = {
    "kill -9": _Kind(10, _ALL, (0.0, 1.0)),
    "kill -9 of a whole pool": _Kind(2, ("prefill", "decode"), (0.0, 1.0)),
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


def layout_of(seed: int) -> Layout:
    return LAYOUTS[seed % len(LAYOUTS)]


def schedule(seed: int, mean_gap_s: float) -> Iterator[Fault]:
    """Without end."""
    kinds, draw, number = kinds_of(layout_of(seed)), Random(f"faults {seed}"), 0
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
