"""KV is pushed, or goes by way of a tier that both workers have, as asked for or as is predicted to be quicker."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace
from routing_rig import Cluster

from bascule.policies.cost import PrefillPart, step_seconds
from bascule.policies.handoff import handoffs, prefill_and_rest
from bascule.policies.route import adaptive, priced
from bascule.policies.snapshot import STORE_TIERS, Snapshot, StoreColumns
from bascule.types import CostModel, LinkCost, Placement, Role, Tier, WorkerId

TOKENS = 2000
BY_TIER = {Tier.HOST: 1e9, Tier.DISK: 2e8, Tier.REMOTE: 5e7}
"""Bytes a second."""


def snapshot_of(places: dict[str, dict[Tier, int]], link: LinkCost | None) -> tuple[Snapshot, Cluster]:
    """`p` prefills and `d` decodes; the numbers of the tiers that each has."""
    cluster = Cluster()
    rows = {"p": cluster.add("p", Role.PREFILL), "d": cluster.add("d", Role.DECODE)}
    if link is not None:
        cluster.links[WorkerId("p"), WorkerId("d")] = link
    shape = (len(cluster.columns.ids), len(STORE_TIERS))
    place = np.full(shape, -1)
    for name, tiers in places.items():
        for tier, number in tiers.items():
            place[rows[name], STORE_TIERS.index(tier)] = number
    byte_s = np.tile([1 / BY_TIER[tier] for tier in STORE_TIERS], (shape[0], 1))
    stores = StoreColumns(place, np.full(shape, 0.001), byte_s)
    return replace(cluster.snapshot(), stores=stores), cluster


SHARED = {name: {Tier.HOST: 1, Tier.DISK: 2} for name in "pd"}
FAST, SLOW = LinkCost(0.002, 4e9), LinkCost(0.002, 1e7)


@pytest.mark.parametrize(
    ("asked", "places", "link", "tier"),
    [
        ("push", SHARED, SLOW, None),
        ("store", SHARED, FAST, Tier.HOST),
        ("auto", SHARED, FAST, None),
        ("auto", SHARED, SLOW, Tier.HOST),
        ("auto", {"p": {Tier.HOST: 1, Tier.DISK: 2}, "d": {Tier.HOST: 3, Tier.DISK: 2}}, SLOW, Tier.DISK),
        ("auto", {"p": {Tier.HOST: 1}, "d": {Tier.HOST: 3}}, SLOW, None),
        ("store", {"p": {Tier.HOST: 1}, "d": {Tier.HOST: 3}}, SLOW, None),
        ("store", {"p": {Tier.REMOTE: 4}, "d": {Tier.REMOTE: 4}}, FAST, Tier.REMOTE),
        ("auto", {"p": {}, "d": {}}, SLOW, None),
    ],
)
def test_the_way_is_the_one_asked_for_or_the_quicker_one(
    asked: str, places: dict[str, dict[Tier, int]], link: LinkCost, tier: Tier | None
) -> None:
    snapshot, cluster = snapshot_of(places, link)
    query = cluster.query(TOKENS, handoff=asked)
    candidate = priced(snapshot, query, Placement(WorkerId("p"), WorkerId("d")))
    assert candidate.handed_by is tier
    ways = {
        name: handoffs(
            snapshot, replace(query, handoff=name), np.array([0]), np.array([1]), np.array([512.0])
        ).exposed_s[0]
        for name in ("push", "store", "auto")
    }
    assert ways["auto"] == pytest.approx(min(ways["push"], ways["store"]))
    assert candidate.predicted.transfer_s == pytest.approx(ways[asked])


def test_the_reason_says_by_way_of_what() -> None:
    snapshot, cluster = snapshot_of(SHARED, SLOW)
    decision = adaptive(snapshot, cluster.query(TOKENS, handoff="store"))
    remote = [each for each in decision.candidates if each.placement.remote]
    assert all(each.handed_by is Tier.HOST for each in remote)
    if decision.placement is not None and decision.placement.remote:
        assert "by way of host" in decision.reason


def test_a_way_more_never_makes_a_handoff_dearer() -> None:
    for rate in (1e6, 1e7, 1e8, 1e9, 1e10):
        snapshot, cluster = snapshot_of(SHARED, LinkCost(0.002, rate))
        placement = Placement(WorkerId("p"), WorkerId("d"))
        pushed, either = (
            priced(snapshot, cluster.query(TOKENS, handoff=way), placement).cost_s for way in ("push", "auto")
        )
        assert either <= pushed + 1e-9


def test_what_the_decode_worker_has_need_not_be_loaded() -> None:
    snapshot, cluster = snapshot_of(SHARED, SLOW)
    ends = np.array([0]), np.array([1]), np.array([512.0])
    query = cluster.query(TOKENS, handoff="store")
    half = query.cached.copy()
    half[1] = TOKENS // 2
    all_of_it, rest = (handoffs(snapshot, replace(query, cached=have), *ends) for have in (query.cached, half))
    spared = TOKENS // 2 * query.kv_token_bytes / BY_TIER[Tier.HOST]
    assert all_of_it.exposed_s[0] - rest.exposed_s[0] == pytest.approx(spared)


@pytest.mark.parametrize(("prompt", "chunks"), [(100, [100]), (512, [512]), (1500, [512, 512, 476])])
def test_over_a_fast_link_only_the_last_chunk_and_the_latency_are_left(prompt: int, chunks: list[int]) -> None:
    cost, link = CostModel(step_s=0.01, token_s=0.001, pair_s=1e-6), LinkCost(0.003, 1e9)
    prefill_s, rest_s = prefill_and_rest(cost, link, prompt, 512, 20_000)
    starts = [512 * index for index in range(len(chunks))]
    assert prefill_s == pytest.approx(
        sum(step_seconds(cost, [PrefillPart(new, start)], 0, 0) for new, start in zip(chunks, starts, strict=True))
    )
    assert rest_s == pytest.approx(0.003 + chunks[-1] * 20_000 / 1e9)


def test_over_a_link_that_does_not_keep_up_chunks_queue() -> None:
    cost, link = CostModel(token_s=0.001), LinkCost(0.003, 1e7)
    prefill_s, rest_s = prefill_and_rest(cost, link, 1500, 512, 20_000)
    # A chunk takes half a second to compute, and a second to push: all pushes but the start of the first are in line.
    assert (prefill_s, rest_s) == (pytest.approx(1.5), pytest.approx(0.512 + 3.0 - 1.5 + 0.003))
