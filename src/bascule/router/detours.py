"""Tiers by way of which handoffs have come to nothing: left out for a while, and then tried again.

A tier that is gone, full or slow says so to nobody but who uses it, and a prompt whose KV it does not keep is computed
twice. So two such handoffs in a row are enough: others go another way, until one that is tried shows the tier to be
back.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct

from bascule.policies.cost import Floats
from bascule.policies.snapshot import STORE_TIERS
from bascule.types import RequestId, Tier

STRIKES = 2
"""Handoffs in a row that come to nothing, each begun after the one before had: a single one may be chance."""
FIRST_S, MOST_S = 1.0, 30.0
"""The first pause, and the longest: each trial in vain doubles it."""
TRIAL_S = 10.0
"""What is waited for a trial to show anything; then another one is made."""


class _Trouble(Struct):
    """What is known of a tier as one worker has it."""

    owed: int = 0
    """Blocks that it has to keep before it is trusted again: as many as the last handoff lost there."""
    strikes: int = 0
    struck_at: float = -math.inf
    pause_s: float = 0.0
    """0 where it is still used."""
    until: float = -math.inf
    """When it is tried again."""
    trial: RequestId | None = None


class Detours:
    """By worker (row) and tier, as one worker alone may have lost its way there. Times are the router's clock's."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Tier], _Trouble] = {}

    def left(self, row: int) -> None:
        """Nothing is known of the worker that takes that row next."""
        for key in [key for key in self._known if key[0] == row]:
            del self._known[key]

    def began(self, row: int, tier: Tier, request: RequestId, now: float) -> None:
        """A handoff goes by that tier; where it is time to try it again, this one is the trial, and others wait."""
        trouble = self._known.get((row, tier))
        if trouble is not None and trouble.pause_s and now >= trouble.until:
            trouble.trial, trouble.until = request, now + TRIAL_S

    def failed(self, row: int, tier: Tier, request: RequestId, blocks: int, begun: float, now: float) -> bool:
        """A handoff of so many blocks, placed at `begun`, has come to nothing there; returns whether the tier is left
        out from now on, and was not before."""
        trouble = self._known.setdefault((row, tier), _Trouble())
        if trouble.pause_s and trouble.trial != request:
            return False  # it was under way, or had no other way
        if not trouble.pause_s and begun <= trouble.struck_at:
            return False
        trouble.owed, trouble.strikes, trouble.struck_at = blocks, trouble.strikes + 1, now
        if trouble.strikes < STRIKES:
            return False
        began = not trouble.pause_s
        trouble.pause_s = min(2 * trouble.pause_s, MOST_S) or FIRST_S
        trouble.until, trouble.trial = now + trouble.pause_s, None
        return began

    def kept(self, row: int, tier: Tier, request: RequestId, blocks: int, now: float) -> bool:
        """A handoff has found so many blocks there, 0 if it has shown nothing; returns whether the tier is used again
        from now on, and was left out before."""
        if (trouble := self._known.get((row, tier))) is None:
            return False
        trouble.owed -= blocks
        if trouble.owed <= 0:
            del self._known[row, tier]
            return trouble.pause_s > 0
        if trouble.trial == request:
            trouble.until, trouble.trial = now, None
        return False

    def shunned(self, rows: int, now: float) -> Floats | None:
        """Seconds for which handoffs leave each tier out: [rows, tiers]; None where they may go by all."""
        waits = {key: trouble.until - now for key, trouble in self._known.items() if trouble.until > now}
        if not waits:
            return None
        seconds = np.zeros((rows, len(STORE_TIERS)))
        for (row, tier), wait_s in waits.items():
            seconds[row, STORE_TIERS.index(tier)] = wait_s
        return seconds
