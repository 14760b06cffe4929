"""Where a request goes: pure functions from a snapshot and a query to a decision.

The three static policies share one shape: pick a prefill worker with room in its window, and a decode worker with a
free slot. They differ in which workers may be picked and in whether the two are one. Requests that find no room wait
unbound at the router, so that the choice is made when the work can start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from bascule.types import Decision, Placement, Role, RouteQuery, Snapshot, WorkerView

Policy = Callable[[Snapshot, RouteQuery], Decision]

POLICIES = ("single", "replicated", "disaggregated")
BALANCES = ("least-loaded", "round-robin")


def policy_named(name: str, balance: str) -> Policy:
    """The policy of that name; raises KeyError for an unknown one (the config names those that exist)."""
    pick = {"least-loaded": least_loaded, "round-robin": round_robin}[balance]
    return {
        "single": partial(whole, pick=pick),
        "replicated": partial(whole, pick=pick),
        "disaggregated": partial(disaggregated, pick=pick),
    }[name]


Pick = Callable[[Sequence[WorkerView], int, Callable[[WorkerView], int]], WorkerView]


def least_loaded(workers: Sequence[WorkerView], turn: int, load: Callable[[WorkerView], int]) -> WorkerView:
    """The worker with the least load; equals take turns, so that no name is favoured. `workers` is not empty."""
    least = min(load(worker) for worker in workers)
    equals = [worker for worker in workers if load(worker) == least]
    return equals[turn % len(equals)]


def round_robin(workers: Sequence[WorkerView], turn: int, load: Callable[[WorkerView], int]) -> WorkerView:
    """The next worker in turn, whatever its load. `workers` is not empty."""
    return workers[turn % len(workers)]


def whole(snapshot: Snapshot, query: RouteQuery, *, pick: Pick) -> Decision:
    """Prefill and decode on one worker, any that is placeable (`single` and `replicated`)."""
    return _local(_placeable(snapshot, query, Role), snapshot, query, pick, "whole requests")


def disaggregated(snapshot: Snapshot, query: RouteQuery, *, pick: Pick) -> Decision:
    """Prefill on one worker and decode on another, from static pools of any sizes.

    Where one of the pools has no worker left, the other serves whole requests: every worker can do both. Attached
    servers take, whole, what finds no room there.
    """
    servers = [worker for worker in _placeable(snapshot, query, Role) if worker.attached]
    decision = _split(snapshot, query, pick)
    if decision.placement is None and servers:
        return _local(servers, snapshot, query, pick, "attached servers take no handoff")
    return decision


def _split(snapshot: Snapshot, query: RouteQuery, pick: Pick) -> Decision:
    """Over workers of our own: no KV goes to or from an attached server."""
    own = Snapshot(tuple(worker for worker in snapshot.workers if not worker.attached), snapshot.turn)
    prefills = _placeable(own, query, (Role.PREFILL, Role.MIXED))
    decodes = _placeable(own, query, (Role.DECODE, Role.MIXED))
    if not prefills or not decodes:
        missing = "prefill" if not prefills else "decode"
        return _local(prefills or decodes, snapshot, query, pick, f"no {missing} worker is placeable")
    open_prefills = [worker for worker in prefills if _takes_prompt(worker, query)]
    open_decodes = [worker for worker in decodes if worker.decoding < worker.slots]
    if not open_prefills:
        return Decision(None, "every prefill worker's window is full")
    if not open_decodes:
        return Decision(None, "every decode worker's slots are taken")
    prefill = pick(open_prefills, snapshot.turn, _prompt_load)
    decode = pick(open_decodes, snapshot.turn, _decode_load)
    return Decision(
        Placement(prefill.id, decode.id),
        f"split: {prefill.id} holds {prefill.prefill_tokens} prompt tokens, {decode.id} decodes {decode.decoding}",
    )


def _local(workers: Sequence[WorkerView], snapshot: Snapshot, query: RouteQuery, pick: Pick, why: str) -> Decision:
    if not workers:
        return Decision(None, "no worker is placeable")
    roomy = [worker for worker in workers if worker.decoding < worker.slots and _takes_prompt(worker, query)]
    if not roomy:
        return Decision(None, "every worker is at its limit of requests or of prompt tokens in flight")
    worker = pick(roomy, snapshot.turn, lambda view: _prompt_load(view) + _decode_load(view))
    return Decision(Placement(worker.id, worker.id), f"{why}: {worker.id} decodes {worker.decoding}")


def _placeable(snapshot: Snapshot, query: RouteQuery, roles: Iterable[Role]) -> list[WorkerView]:
    """Workers of these roles that may be used; those that failed this request only when there is no other."""
    allowed = frozenset(roles)
    usable = [
        worker
        for worker in snapshot.workers
        if worker.placeable and worker.role in allowed and (query.portable or not worker.attached)
    ]
    return [worker for worker in usable if worker.id not in query.excluded] or usable


def _takes_prompt(worker: WorkerView, query: RouteQuery) -> bool:
    """An idle worker takes any prompt; a busy one only what its window still holds."""
    return worker.prefilling == 0 or worker.prefill_tokens + query.prompt_tokens <= worker.prefill_window


def _prompt_load(worker: WorkerView) -> int:
    return worker.prefill_tokens


_DECODE_WEIGHT = 64
"""A running stream counts as this many prompt tokens where both are compared; a rough rate until costs are measured."""


def _decode_load(worker: WorkerView) -> int:
    return _DECODE_WEIGHT * worker.decoding
