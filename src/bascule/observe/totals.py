"""What workers count, those that have left included, and what the router counts of requests: totals that never fall."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from bascule.types import StoreHandoff, StoreLoad, Tier, WorkerLoad

Key = tuple[str, ...]
"""A counter's name in the metrics, and the values of its labels."""

PROMPTS = "bascule_prompt_tokens"
HITS = "bascule_kv_hit_tokens"
HANDED_BYTES = "bascule_store_handoff_bytes"
HANDED_AGAIN = "bascule_store_handoff_computed_tokens"
EVICTIONS = "bascule_kv_store_evictions"

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "bascule_handoff_bytes": ("Bytes of KV pushed to peers", ("transport",)),
    "bascule_handoff_refused": ("Handoffs refused by the receiver", ("reason",)),
    PROMPTS: ("Prompt tokens of requests that have a first token", ()),
    HITS: ("Of these, tokens found and not computed", ("tier",)),
    "bascule_prompt_tokens_computed": ("Prompt tokens that steps of workers have computed", ()),
    HANDED_BYTES: ("Bytes of KV handed over by way of the KV store", ("tier", "way")),
    HANDED_AGAIN: ("Prompt tokens of such handoffs that decode computed a second time", ()),
    "bascule_kv_store_bytes": ("Bytes of KV moved", ("tier", "way")),
    "bascule_kv_store_load_seconds": ("Spent on loading KV", ("tier",)),
    "bascule_kv_store_spared_seconds": ("Computing that loads spared", ("tier",)),
    EVICTIONS: ("Blocks evicted from a tier", ("tier",)),
    "bascule_kv_store_faults": ("Blocks not read or taken", ("tier", "reason")),
    "bascule_kv_store_invalid": ("Blocks that were not valid", ("tier", "reason")),
    "bascule_kv_fetch_bytes": ("Bytes of KV that workers fetched from others", ()),
    "bascule_kv_fetch_seconds": ("Spent on fetching KV", ()),
    "bascule_kv_fetch_spared_seconds": ("Computing that fetches spared", ()),
    "bascule_kv_fetch_failed": ("Fetches that brought nothing", ("reason",)),
}
"""By name: what it counts, and its labels."""
_MOST_KEYS = 1000
"""Workers name reasons and transports, of which there are a few dozen; a confused one might invent them without end."""


def counts_of(load: WorkerLoad) -> dict[Key, float]:
    """All that one worker has counted since its start."""
    counts: dict[Key, float] = {}
    _put(counts, load.handoff_bytes, "bascule_handoff_bytes")
    _put(counts, load.handoff_refused, "bascule_handoff_refused")
    for tier, store in load.stores.items():
        counts |= _counts_of_tier(tier, store)
    fetches = load.fetches
    counts["bascule_prompt_tokens_computed",] = load.computed_tokens
    counts["bascule_kv_fetch_bytes",] = fetches.bytes
    counts["bascule_kv_fetch_seconds",] = fetches.fetch_s
    counts["bascule_kv_fetch_spared_seconds",] = fetches.spared_s
    _put(counts, fetches.failed, "bascule_kv_fetch_failed")
    return counts


def _counts_of_tier(tier: Tier, store: StoreLoad) -> dict[Key, float]:
    counts: dict[Key, float] = {
        ("bascule_kv_store_bytes", tier, "loaded"): store.loaded_bytes,
        ("bascule_kv_store_bytes", tier, "saved"): store.saved_bytes,
        ("bascule_kv_store_load_seconds", tier): store.load_s,
        ("bascule_kv_store_spared_seconds", tier): store.spared_s,
        (EVICTIONS, tier): store.evictions,
    }
    _put(counts, store.errors, "bascule_kv_store_faults", tier)
    _put(counts, store.invalid, "bascule_kv_store_invalid", tier)
    return counts


def _put(counts: dict[Key, float], parts: Mapping[str, int], *key: str) -> None:
    counts.update({(*key, label): count for label, count in parts.items()})


class Totals:
    """What has been counted since this was made. As long as it lives, no total falls."""

    def __init__(self) -> None:
        self._sums: defaultdict[Key, float] = defaultdict(float)
        self._told: dict[Key, float] = dict.fromkeys(
            ((name,) for name, (_, labels) in COUNTERS.items() if not labels), 0
        )
        self._told[HITS, Tier.DEVICE] = 0

    def grew(self, before: WorkerLoad, now: WorkerLoad, *, remote: bool) -> None:
        """A worker tells its counts anew. `remote`: whether what the servers of the `remote` tier have evicted is for
        this one to tell; all that share them see the same."""
        known = counts_of(before)
        for key, count in counts_of(now).items():
            if key == (EVICTIONS, Tier.REMOTE) and not remote:
                continue
            self._add(key, count - known.get(key, 0))

    def found(self, prompt: int, cached: int, loaded: Mapping[str, int]) -> None:
        """A request's prompt is computed: `cached` of its tokens were found, and `loaded` says which of these came from
        elsewhere, by tier or `peer`. Each token counts once, and no more of them than there are."""
        self._add((PROMPTS,), prompt)
        left = min(cached, prompt)
        for tier, tokens in loaded.items():
            taken = min(tokens, left)
            left -= taken
            if taken:
                self._add((HITS, tier), taken)
        self._add((HITS, Tier.DEVICE), left)

    def handed_over(self, handoff: StoreHandoff) -> None:
        """A request that went by way of the store is over."""
        for tier, size in handoff.saved_bytes.items():
            self._add((HANDED_BYTES, tier, "saved"), size)
        for tier, size in handoff.loaded_bytes.items():
            self._add((HANDED_BYTES, tier, "loaded"), size)
        self._add((HANDED_AGAIN,), handoff.computed_tokens)

    def _add(self, key: Key, count: float) -> None:
        if key in self._sums or len(self._sums) < _MOST_KEYS:
            self._sums[key] += count

    def read(self) -> dict[Key, float]:
        """All totals by now.

        Where a worker takes back what it has told (of servers that were started anew, say), a total stands still until
        it has caught up.
        """
        for key, count in self._sums.items():
            self._told[key] = max(self._told.get(key, 0), count)
        return dict(self._told)
