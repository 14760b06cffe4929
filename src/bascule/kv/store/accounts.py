"""The audit of what tiers say they hold and have reserved: looked at while a worker has nothing to do with them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from bascule.kv.store.base import Store
from bascule.types import Tier

log = logging.getLogger(__name__)


class Accounts:
    """Of the stores of one process."""

    def __init__(self, stores: Mapping[Tier, Store]) -> None:
        self.violations: list[str] = []
        """What the last look found; must be empty."""
        self._stores = stores

    def look(self) -> None:
        """Call it from one thread, now and then, while this process saves and loads nothing. What is new is logged."""
        found = [f"the {tier} tier: {line}" for tier, store in self._stores.items() for line in store.check_integrity()]
        for violation in found:
            if violation not in self.violations:
                log.error("integrity: %s", violation)
        self.violations = found
