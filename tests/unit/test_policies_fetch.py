"""KV that another worker has is fetched where that is predicted to be quicker than computing it, or loading it."""

from __future__ import annotations

import numpy as np
import pytest
from routing_rig import Cluster

from bascule.policies.route import adaptive
from bascule.types import LinkCost, WorkerId

TOKENS = 1000
FAST, SLOW = LinkCost(0.002, 1e9), LinkCost(0.002, 1e6)


def cluster_of(*names: str, cached: dict[str, int] | None = None, link: LinkCost | None = None) -> Cluster:
    made = Cluster()
    rows = {name: made.add(name, cached=(cached or {}).get(name, 0)) for name in names}
    if link is not None:
        for source in rows:
            for target in rows:
                made.links[WorkerId(source), WorkerId(target)] = link
    return made


def test_a_worker_without_the_prefix_fetches_it_from_the_busy_one_that_has_it() -> None:
    cluster = Cluster()
    a = cluster.add("a", prompts=(900, 900), cached=960)
    cluster.add("b")
    cluster.links[WorkerId("a"), WorkerId("b")] = FAST
    query = cluster.query(TOKENS, peer=a, peer_tokens=960)
    decision = adaptive(cluster.snapshot(), query)
    winner = decision.candidates[0]
    assert winner.placement.decode == "b"
    assert (winner.cached_tokens, winner.loaded_tokens, winner.fetch_from) == (960, 960, "a")
    seconds = FAST.latency_s + 960 * query.kv_token_bytes / FAST.bytes_per_s
    assert winner.predicted.load_s == pytest.approx(seconds)
    assert "960 of them on a" in decision.reason
    alone = adaptive(cluster.snapshot(), cluster.query(TOKENS)).candidates
    assert winner.cost_s < min(each.cost_s for each in alone)


def test_nobody_fetches_over_a_link_that_is_slower_than_computing() -> None:
    cluster = cluster_of("a", "b", cached={"a": 960}, link=SLOW)
    plain = adaptive(cluster.snapshot(), cluster.query(TOKENS))
    offered = adaptive(cluster.snapshot(), cluster.query(TOKENS, peer=0, peer_tokens=960))
    assert [each.predicted for each in offered.candidates] == [each.predicted for each in plain.candidates]
    assert all(each.fetch_from is None for each in offered.candidates)


def test_who_has_as_much_fetches_nothing_and_nobody_fetches_from_itself() -> None:
    cluster = cluster_of("a", "b", "c", cached={"a": 960, "b": 960}, link=FAST)
    decision = adaptive(cluster.snapshot(), cluster.query(TOKENS, peer=0, peer_tokens=960))
    for candidate in decision.candidates:
        fetches = candidate.placement.prefill == "c"
        assert (candidate.fetch_from == "a") == fetches
        assert (candidate.loaded_tokens == 960) == fetches


@pytest.mark.parametrize(("load_s", "source"), [(0.001, None), (5.0, "a")])
def test_of_store_and_peer_the_quicker_one_is_taken(load_s: float, source: str | None) -> None:
    cluster = Cluster()
    a = cluster.add("a", prompts=(900, 900), cached=960)
    b = cluster.add("b")
    cluster.links[WorkerId("a"), WorkerId("b")] = FAST
    have = cluster.query(TOKENS).cached.copy()
    have[b] = 960
    seconds = np.where(have > cluster.query(TOKENS).cached, load_s, 0.0)
    query = cluster.query(TOKENS, peer=a, peer_tokens=960, stored=have, load_s=seconds)
    winner = adaptive(cluster.snapshot(), query).candidates[0]
    assert (winner.placement.decode, winner.loaded_tokens, winner.fetch_from) == ("b", 960, source)


def test_a_slower_link_never_makes_a_worker_more_attractive() -> None:
    prices = []
    for rate in (1e10, 1e9, 1e8, 3e7, 1e7, 1e6):
        cluster = Cluster()
        a = cluster.add("a", prompts=(900, 900, 900), cached=960)
        cluster.add("b")
        cluster.links[WorkerId("a"), WorkerId("b")] = LinkCost(0.002, rate)
        query = cluster.query(TOKENS, peer=a, peer_tokens=960)
        decision = adaptive(cluster.snapshot(), query)
        prices.append(next(each.cost_s for each in decision.candidates if each.placement.decode == "b"))
    assert prices == sorted(prices)
    assert prices[0] < prices[-1]


def test_what_the_peer_has_to_load_first_counts() -> None:
    cluster = Cluster()
    a = cluster.add("a", prompts=(900, 900), cached=0)
    cluster.add("b")
    cluster.links[WorkerId("a"), WorkerId("b")] = FAST
    at_once, later, too_late = (
        adaptive(cluster.snapshot(), cluster.query(TOKENS, peer=a, peer_tokens=960, peer_load_s=seconds)).candidates[0]
        for seconds in (0.0, 0.1, 60.0)
    )
    assert later.predicted.load_s == pytest.approx(at_once.predicted.load_s + 0.1)
    assert too_late.fetch_from is None


def test_an_attached_server_fetches_nothing() -> None:
    cluster = Cluster()
    a = cluster.add("a", prompts=(900, 900), cached=960)
    cluster.add("server", hands_off=False)
    decision = adaptive(cluster.snapshot(), cluster.query(TOKENS, peer=a, peer_tokens=960))
    assert {each.placement.decode: each.loaded_tokens for each in decision.candidates}["server"] == 0
