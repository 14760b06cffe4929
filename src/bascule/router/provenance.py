"""Where one request's KV came from: what its first prefill found, and what a handoff by way of the store moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from bascule.types import PEER, Brought, StoreHandoff


class Provenance:
    """Of one request, over all its attempts.

    What of the prompt was found is what the first prefill found: whoever goes on with the request finds in other caches
    what has been computed, or found, before.
    """

    def __init__(self) -> None:
        self.cached_tokens: int | None = None
        """Prompt tokens that the first prefill found; None before the first token."""
        self.brought = Brought()
        """What of it came from the store or from a peer."""
        self._handoffs: list[StoreHandoff] = []
        """By way of the store, as far as a decode worker was asked to go on."""
        self._handing = False
        """The last of them is the current attempt's."""
        self._awaits = False
        """Its decode worker has sent no token."""

    @property
    def handoff(self) -> StoreHandoff | None:
        """What all handoffs by way of the store have moved by now; None if there was none."""
        return summed(self._handoffs)

    def loaded(self, brought: Brought) -> None:
        """A worker has found so much by now of what it loaded for the current attempt."""
        if self.cached_tokens is None:
            self.brought = brought
        elif self._handing:
            self._handoffs[-1] = replace(
                self._handoffs[-1],
                loaded_tokens=brought.tokens,
                loaded_bytes=brought.bytes,
                load_s=brought.seconds,
            )

    def handed(self) -> None:
        """The decode worker is asked to go on with what the prefill worker has put into the store."""
        self._handoffs.append(StoreHandoff())
        self._handing = self._awaits = True

    def saved(self, sizes: dict[str, int]) -> None:
        """The prefill worker has written so many bytes for the current attempt's handoff, by tier."""
        if self._handing:
            self._handoffs[-1] = replace(self._handoffs[-1], saved_bytes=sizes)

    def drew(self, prompt_tokens: int, cached_tokens: int) -> None:
        """There is a token more, from a worker that found so many of the prompt's."""
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
        elif self._awaits:
            self._awaits = False
            again = max(0, prompt_tokens - cached_tokens)
            self._handoffs[-1] = replace(self._handoffs[-1], computed_tokens=again)

    def came_and_lost(self, prompt_tokens: int, blocks: int, block_tokens: int) -> tuple[int, int]:
        """Of the current attempt's handoff, whose decode worker has a token: how many of the prompt's full blocks came
        by way of the store, and how many were fetched from a peer instead, or computed again."""
        if not self._handing:
            return 0, 0
        handoff = self._handoffs[-1]
        again = handoff.computed_tokens - (prompt_tokens - blocks * block_tokens)  # no tier has the part of a block
        fetched = handoff.loaded_tokens.get(PEER, 0)
        came = sum(handoff.loaded_tokens.values()) - fetched
        return came // block_tokens, (max(again, 0) + fetched) // block_tokens

    def given_up(self) -> None:
        """The current attempt is."""
        self._handing = self._awaits = False
        if self.cached_tokens is None:
            self.brought = Brought()


def summed(handoffs: Iterable[StoreHandoff]) -> StoreHandoff | None:
    """What several have moved; None of none."""
    each = list(handoffs)
    if not each:
        return None
    return StoreHandoff(
        saved_bytes=_total(one.saved_bytes for one in each),
        loaded_tokens=_total(one.loaded_tokens for one in each),
        loaded_bytes=_total(one.loaded_bytes for one in each),
        load_s=sum(one.load_s for one in each),
        computed_tokens=sum(one.computed_tokens for one in each),
    )


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
