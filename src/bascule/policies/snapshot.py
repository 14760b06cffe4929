"""What routing policies read and return: the cluster as columns, a query, candidates with their price, a decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bascule.policies.cost import CostColumns, Floats
from bascule.types import LinkCost, Placement, RequestId, Role, Slo, Tier, WorkerId

ROLES = tuple(Role)
"""A worker's role in the columns is its place in this tuple."""
PREFILL, DECODE, MIXED = range(3)

SIZES = 16
"""Columns of `ahead_tokens`: prompts of less than 2, 4, 8 ... 65,536 uncached tokens; longer ones in the last."""


CHUNK_TOKENS = 512
"""Most prompt tokens of a step, unless workers are told otherwise."""


def size_of(tokens: int) -> int:
    """The column of `Snapshot.ahead_tokens` for a prompt with so many tokens to compute."""
    return min(max(tokens, 1).bit_length() - 1, SIZES - 1)


STORE_TIERS = (Tier.HOST, Tier.DISK, Tier.REMOTE)
"""Below the device, the fastest first."""


class StoreColumns(Struct, frozen=True):
    """The tiers of the KV store: [rows, tiers], in the order of `STORE_TIERS`."""

    place: NDArray[np.int64]
    """Workers with equal numbers share a tier; less than 0 where a worker has none."""
    latency_s: Floats
    byte_s: Floats
    """What loading from it takes."""
    shunned_s: Floats | None = None
    """Seconds for which a worker's handoffs leave a tier out, as the last ones have come to nothing there, until it is
    tried again; 0 where they do not. None if none does anywhere."""


class Snapshot(Struct, frozen=True, kw_only=True):
    """The cluster as a policy sees it: one row a worker, in arrays that are updated in place between decisions.

    A policy must not write them, nor keep them. What the router has placed counts at once, before a worker reports it.
    """

    ids: list[WorkerId]
    """By row; rows that no worker has are not placeable."""
    role: NDArray[np.int8]
    placeable: NDArray[np.bool_]
    hands_off: NDArray[np.bool_]
    """A worker of our own. An attached server of another kind takes whole requests only (no KV goes to or from it), and
    none whose output only our own engine can continue (`RouteQuery.portable`)."""
    slots: NDArray[np.int64]
    """Most requests it decodes at once."""
    decoding: NDArray[np.int64]
    """Requests placed here to be decoded (from placement on)."""
    prefilling: Floats
    """Requests placed here whose first token has not come."""
    streams: Floats
    """Requests that decode here now, as the worker last said."""
    ahead_tokens: Floats
    """Tokens of those still to be computed, summed up to each size of prompt: [rows, SIZES]. What goes before a prompt
    of that size, where short ones go first; the last column is all of them."""
    prompts_behind: Floats
    """How many of `prefilling` are prompts of a larger size: [rows, SIZES]."""
    context_tokens: Floats
    """Tokens of context of the requests in `decoding`."""
    kv_tokens: NDArray[np.int64]
    """Tokens that its KV memory holds."""
    prefill_share: Floats
    """Share of its time that prompts placed here have lately taken, from 0 to 1."""
    stretch: Floats
    """How many times longer steps of its streams have lately been than of streams alone: for the prompts in them, and
    for all that a cost model does not know."""
    lag: Floats
    """How many times longer than predicted prompts have lately taken: [rows, 3], to be computed those that fit into one
    chunk, the same of longer ones, and in the queue."""
    slack_s: Floats
    """What prompts may take at once from the streams that decode, beyond what just keeps their TPOT."""
    step_age_s: Floats
    """Since the step that runs now has begun; 0 where none does."""
    cost: CostColumns
    chunk_tokens: Floats
    """Most prompt tokens in a step."""
    machine: NDArray[np.int64]
    """Workers of equal number share memory."""
    turn: int
    """Decisions made before this one."""
    window_tokens: int = 4096
    """Prompt tokens that may be in flight to a worker before further requests wait unbound at the router."""
    links: Mapping[tuple[WorkerId, WorkerId], LinkCost]
    """Handoffs from one worker to another, where they have been measured."""
    stores: StoreColumns | None = None
    """None where no worker has a store."""
    unreached: Mapping[int, frozenset[int]] = {}
    """Rows of the workers that the worker of a row cannot connect to, as it says; rows that reach all are not in it."""

    def row_of(self, worker: WorkerId) -> int:
        """Raises ValueError for a worker that is not there."""
        return self.ids.index(worker)

    def estranged(self, row: int) -> list[int]:
        """Rows whose workers cannot connect to that of `row`, or are not reached from there."""
        return [*self.unreached.get(row, ()), *(other for other, cut in self.unreached.items() if row in cut)]


class RouteQuery(Struct, frozen=True, kw_only=True):
    """What a routing policy knows of a request."""

    request: RequestId
    prompt_tokens: int
    """Tokens to be computed before the next can be drawn, cached ones included."""
    max_tokens: int
    cached: NDArray[np.int64]
    """How many of `prompt_tokens` each worker (row) has KV of."""
    stored: NDArray[np.int64] | None = None
    """How many it has or can load from the store, at least `cached`; None where there is no store."""
    load_s: Floats | None = None
    """Seconds that loading the difference takes."""
    peer: int = -1
    """The row of a worker that others may fetch KV of the prompt from."""
    peer_tokens: int = 0
    """How many tokens' it has, or can load from its host's memory."""
    peer_load_s: float = 0.0
    """Seconds that it takes to load them."""
    output_tokens: float = 64.0
    """Output to be expected: a quantile of what this traffic does, at most `max_tokens`."""
    slo: Slo = Slo()
    waited_s: float = 0.0
    """Since the request came."""
    kv_token_bytes: int = 0
    handoff: Literal["push", "store", "auto"] = "push"
    """By way of what KV is handed over; `store` only between workers that share a tier."""
    gap_planned_s: float = 0.2
    """Gap that the workers cut their chunks for."""
    tpot_planned_s: float = np.inf
    """The same of TPOT, of requests that ask for nothing else."""
    line_s: float = 0.0
    """Seconds of work of the prompts of others that wait unbound at the router."""
    session: int = -1
    """The row of the worker that answered this conversation's last turn, if there is one."""
    portable: bool = True
    """False where its output has begun and only a worker of our own can go on exactly as it began."""
    excluded: frozenset[WorkerId] = frozenset()
    """Workers that already failed this request."""


class Prediction(Struct, frozen=True, kw_only=True, array_like=True):
    """What a placement is expected to bring, in seconds."""

    queue_s: float = 0.0
    """From the decision until the worker starts on the prompt."""
    load_s: float = 0.0
    """What bringing KV from the store or from a peer takes longer than the queue."""
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    """What is left of the handoff once the last chunk is computed."""
    ttft_s: float = 0.0
    """From receiving the request, so what it has waited is in it."""
    tpot_s: float = 0.0
    gap_s: float = 0.0
    harm_s: float = 0.0
    """What it costs the requests already there: seconds, summed over them."""


class Candidate(Struct, frozen=True, kw_only=True, array_like=True):
    """One placement with its price. `feasible` ones may be chosen; `why_not` says what speaks against the others, or
    which bound of the SLO a feasible one breaks."""

    placement: Placement
    predicted: Prediction
    handed_by: Tier | None = None
    """The tier of the store by way of which KV is handed over; None where it is pushed, or stays."""
    cached_tokens: int = 0
    """Prompt tokens that need not be computed there."""
    loaded_tokens: int = 0
    """Those of them that are to be loaded from the store, or fetched."""
    fetch_from: WorkerId | None = None
    """The peer to fetch them from; None for the store."""
    cost_s: float = 0.0
    """What it is chosen by: the request's own latency and the harm to others, with a price on each broken SLO."""
    feasible: bool = True
    why_not: str = ""


class Decision(Struct, frozen=True, kw_only=True):
    """What a routing policy returns: a placement, or None to wait for capacity, and the reason in a sentence."""

    placement: Placement | None
    reason: str
    candidates: tuple[Candidate, ...] = ()
    """Those that were compared, the best first; may be empty where a policy predicts nothing."""

    def chosen(self) -> Candidate | None:
        """The candidate of the placement, if it is among them."""
        return next((each for each in self.candidates if each.placement == self.placement), None)


Policy = Callable[[Snapshot, RouteQuery], Decision]
"""Pure: equal inputs give equal decisions."""
