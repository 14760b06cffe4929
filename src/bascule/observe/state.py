"""What a cluster is and has done, as its router knows it at one time."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from bascule.observe.totals import Key
from bascule.types import Tier, WorkerStatus


class RoutingFigures(Struct, frozen=True, kw_only=True):
    """What the router has decided since it started, and how well it predicted."""

    errors: dict[str, float] = {}
    """Median of |predicted - actual| / actual over the latest completed requests, by term (`ttft`, `tpot`)."""
    decisions: dict[str, int] = {}
    """Placements by kind (`local`, `remote`)."""
    rejected: dict[str, int] = {}
    """Requests answered 429, by reason (`queue`, `slo`)."""
    policy_failures: int = 0
    """Decisions that a plug-in policy failed to make."""
    log_lost: int = 0
    """Requests that could not be written to the decision log."""


class ClusterState(Struct, frozen=True, kw_only=True):
    workers: tuple[WorkerStatus, ...]
    queued: int
    """Requests that wait unbound at the router."""
    active: int
    """Requests placed and not ended."""
    routing: RoutingFigures = RoutingFigures()
    store_handoffs: int = 0
    """Requests that went from one worker to another by way of the KV store."""
    retries: dict[str, int] = {}
    """Requests placed again, by cause (`failed`, `lost`, `unheard`, `moved`); `refused` for want of a budget."""
    rests: dict[str, int] = {}
    """How often workers got no requests for a while because they failed many, by worker."""
    kv_faults: dict[str, int] = {}
    """Reports of workers' KV that were lost (`gap`) or not usable (`overflow`, `malformed`, `stranger`), and those that
    an audit of the index has asked for (`strayed`), by kind."""
    index_violations: int = 0
    """What the last audit of the router's prefix index found; must be 0."""
    totals: Mapping[Key, float] = {}
    """What all workers have counted since the router started, those that have left included (`observe.totals`)."""
    store_blocks: Mapping[Tier, int] = {}
    """Blocks in each tier of the KV store; what several workers share counts once."""

    @property
    def integrity_violations(self) -> int:
        """Of the index and of all workers' books."""
        return self.index_violations + sum(worker.load.integrity_violations for worker in self.workers)
