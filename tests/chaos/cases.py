"""The faults of `chaos.recovery`: which, in which phase of a request's life, and what each may cost it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chaos.phases import HUNG_S
from chaos.schedule import DEAD_S, LEASE_S


@dataclass(frozen=True)
class Phase:
    """Of a request's life, as one of its two workers sees it."""

    name: str
    side: str
    at: str
    """As the orders of `chaos.phases` call it."""


PHASES = (
    Phase("queued", "prefill", "queued"),
    Phase("prefilling", "prefill", "prefilling"),
    Phase("transferring", "prefill", "transferring"),
    Phase("transferring", "decode", "written"),
    Phase("committed", "prefill", "accepted"),
    Phase("committed", "decode", "committed"),
    Phase("decoding", "decode", "decoding"),
)


@dataclass(frozen=True)
class Case:
    """A fault in a phase."""

    phase: str
    whose: str
    """The worker that it befalls, by its part in the request; or the connection."""
    fault: str
    order: str
    at: str
    promised_s: float
    """What it may cost, computing again included."""
    seconds: float = 0.0

    @property
    def bound_s(self) -> float:
        """What a test lets it cost: generous, for machines that do other things too."""
        return self.promised_s + _SLACK_S

    @property
    def parent(self) -> str:
        """What the workers' parent does when one ends, as `chaos.faulty_serve` says."""
        return "deaf" if self.fault == UNTOLD else "tells"

    @property
    def is_felt(self) -> bool:
        """Whether the request cannot go on where it is. Once accepted, it may no longer need its prefill worker; that
        may go on alone while blocks are written."""
        return self.at not in ("accepted", "written") and (
            self.fault in (KILLED, UNTOLD, DEAD, HANGS) or self.order == "drop"
        )

    @property
    def leaves_kv(self) -> bool:
        """Whether a decode worker is gone while its prefill worker still has the KV of the whole prompt."""
        return self.fault == KILLED and self.at in ("committed", "decoding")

    @property
    def id(self) -> str:
        return "-".join([self.phase, self.whose, self.fault]).replace(" ", "_")


KILLED, UNTOLD, BRIEFLY, DEAD = "kill -9", "kill -9, nobody tells", "paused briefly", "paused until dead"
HANGS = "step hangs"
_SLACK_S = 8.0


def _cases() -> Iterator[Case]:
    for fault, order, promised_s, seconds in (
        (KILLED, "die", 2.0, 0.0),
        (UNTOLD, "die", 2.0, 0.0),
        (BRIEFLY, "sleep", 2.0, 0.4),
        (DEAD, "sleep", DEAD_S + 2.0, DEAD_S + 2.0),
    ):
        for phase in PHASES:
            yield Case(phase.name, phase.side, fault, order, phase.at, promised_s, seconds)
    for name, whose, fault, order, at, promised_s, *seconds_s in (
        ("prefilling", "prefill", HANGS, "hang", "prefilling", HUNG_S + 2.0),
        ("decoding", "decode", HANGS, "hang", "decoding", HUNG_S + 2.0),
        ("queued", "router link", "submission lost", "drop", "queued", 5.0),
        ("transferring", "transfer", "connection cut", "cut", "transferring", 2.0),
        ("transferring", "transfer", "frame flipped", "flip", "transferring", 2.0),
        ("transferring", "transfer", "frame doubled", "duplicate", "transferring", 2.0),
        ("transferring", "transfer", "frame shortened", "truncate", "transferring", LEASE_S + 2.0),
        ("transferring", "transfer", "receiver stalls", "stall", "transferring", LEASE_S + 2.0, LEASE_S + 2.0),
        ("committed", "peer link", "Accepted lost", "lose", "Accepted", 2.0),
        ("decoding", "router link", "token lost", "drop", "decoding", 6.0),
        ("decoding", "router link", "last token lost", "drop", "ending", 5.0),
    ):
        yield Case(name, whose, fault, order, at, promised_s, *seconds_s)


CASES = tuple(_cases())
NOTES = {phase.at: Case(phase.name, phase.side, "none", "note", phase.at, 0.0) for phase in PHASES}
"""What a request waits at each point without a fault."""
