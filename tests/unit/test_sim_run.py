"""Whole simulations: seeded, complete, with clean books; and what they are made of."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from bascule.errors import ConfigError
from bascule.sim.agenda import Agenda
from bascule.sim.cluster import Cluster, Death, Pool
from bascule.sim.figures import outcome_figures
from bascule.sim.network import Network
from bascule.sim.offered import speed_for, trace_talks
from bascule.sim.run import Outcome, Simulation
from bascule.sim.tiers import TierPlan
from bascule.sim.worker import Kind
from bascule.traffic.traces import TraceRequest
from bascule.traffic.workloads import talks
from bascule.types import CostModel, LinkCost, Role, Tier

COST = CostModel(
    step_s=0.004, token_s=0.0005, pair_s=1e-7, context_s=1e-6, draw_s=1e-4, stream_s=(0.006, 0.007, 0.009, 0.014)
)
KIND = Kind(name="core", cost=COST, kv_tokens=40_000)
POLICIES = ("replicated", "disaggregated", "adaptive", "thresholds", "prefix-only")


def cluster(policy: str, workers: int = 2, kind: Kind = KIND, **fields: Any) -> Cluster:
    pools = (Pool(Role.MIXED, kind, workers),)
    if policy in ("disaggregated", "thresholds"):
        pools = (Pool(Role.PREFILL, kind, workers // 2), Pool(Role.DECODE, kind, workers - workers // 2))
    return Cluster(policy=policy, pools=pools, **fields)


def mixed(given: Cluster, seed: int = 1, requests: int = 24, clients: int | None = 6) -> Outcome:
    return Simulation(given).offer(talks("mixed", requests, seed, None if clients else 3.0), clients)


def conversation(requests: int) -> list[TraceRequest]:
    """Prompts of five blocks, of which pairs share the first four."""
    return [
        TraceRequest(
            at=4.0 * n,
            prompt_tokens=2700,
            output_tokens=20,
            hash_ids=(*range(n // 2 * 100, n // 2 * 100 + 4), 9_000 + n, 80_000 + n),
        )
        for n in range(requests)
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("clients", [6, None])
def test_every_request_ends_with_all_its_tokens_and_the_books_are_clean(policy: str, clients: int | None) -> None:
    outcome = mixed(cluster(policy), clients=clients)
    wanted = [ask.output for talk in talks("mixed", 24, 1) for ask in talk.asks]
    assert sorted(record.tokens for record in outcome.run.records) == sorted(wanted)
    assert all(not record.error and 0 < record.ttft < record.e2e for record in outcome.run.records)
    assert outcome.violations == []
    assert (outcome.handoffs > 0) == (policy == "disaggregated") or policy in ("adaptive", "thresholds")


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    slo = cluster("adaptive").slo
    first, again, other = (outcome_figures(mixed(cluster("adaptive"), seed), slo) for seed in (1, 1, 2))
    assert first == again != other


def test_conversations_go_on_with_what_was_answered() -> None:
    outcome = Simulation(cluster("replicated", 1)).offer(talks("multi-turn", 12, 1), 2)
    assert len(outcome.run.records) == 12
    assert sum(record.cached > 0 for record in outcome.run.records) >= 8  # all turns but the first of each


def test_blocks_that_a_trace_names_alike_are_found_and_others_are_not() -> None:
    trace = conversation(10)
    for block_tokens in (512, 128):
        given = cluster("replicated", 1, block_tokens=block_tokens)
        outcome = Simulation(given).offer(trace_talks(trace, block_tokens), None)
        assert sorted(record.cached for record in outcome.run.records) == [0] * 5 + [2048] * 5
    unnamed = [replace(request, hash_ids=()) for request in trace]
    outcome = Simulation(cluster("replicated", 1)).offer(trace_talks(unnamed, 16), None)
    assert all(record.cached == 0 for record in outcome.run.records)


def test_blocks_that_do_not_go_into_the_traces_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 100 tokens do not go into the trace's blocks of 512"):
        list(trace_talks(conversation(2), 100))


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0"])
def test_a_worker_that_dies_costs_time_and_no_request(worker: str) -> None:
    given = cluster("disaggregated", 4)
    whole, broken = (mixed(replace(given, deaths=deaths)) for deaths in ((), (Death(2.0, worker),)))
    assert len(broken.run.records) == len(whole.run.records) and all(not one.error for one in broken.run.records)
    assert broken.run.wall_s > whole.run.wall_s
    assert broken.violations == []


def test_memory_for_few_requests_makes_others_wait_and_loses_none() -> None:
    outcome = mixed(cluster("disaggregated", kind=replace(KIND, kv_tokens=4_096)), clients=12)
    assert all(not record.error for record in outcome.run.records) and outcome.violations == []


def test_refusals_are_counted_and_do_not_stop_the_rest() -> None:
    outcome = Simulation(cluster("replicated", 1, queue_limit=1)).offer(talks("summarise", 30, 1, 20.0), None)
    figures = outcome_figures(outcome, cluster("replicated").slo)
    assert figures["rejected"] > 0 and figures["completed"] + figures["rejected"] == 30 == figures["requests"]


def test_a_slow_link_is_felt_by_the_tokens_behind_the_first() -> None:
    fast, slow = (
        outcome_figures(mixed(cluster("disaggregated", machine_workers=1, link_bytes_per_s=rate)), given.slo)
        for given, rate in ((cluster("disaggregated"), 1e10), (cluster("disaggregated"), 1e7))
    )
    assert slow["itl_s"]["max"] > 5 * fast["itl_s"]["max"]


def test_transfers_in_flight_share_the_link_and_only_that() -> None:
    agenda, ended = Agenda(), dict[str, float]()
    network = Network(agenda, 100.0, 1000.0)
    for name, ends, at, size in (("a", (0, 1), 0.0, 100), ("b", (0, 2), 0.5, 100), ("c", (3, 3), 0.5, 100)):
        agenda.at(
            at,
            lambda name=name, ends=ends, size=size: (
                network.send(  # type: ignore[misc]
                    *ends, size, lambda: ended.update({name: agenda.now()})
                )
                and None
            ),
        )
    agenda.run(lambda: False)
    assert ended == pytest.approx({"a": 1.5, "b": 2.0, "c": 0.6})


def test_the_speed_for_a_load_scales_with_load_and_workers() -> None:
    trace = conversation(20)
    half = speed_for(0.5, trace, cluster("replicated", 2))
    assert speed_for(1.0, trace, cluster("replicated", 2)) == pytest.approx(2 * half)
    assert speed_for(0.5, trace, cluster("replicated", 8)) == pytest.approx(4 * half)
    with pytest.raises(ConfigError, match="a load of 0 is not possible"):
        speed_for(0.0, trace, cluster("replicated"))
    with pytest.raises(ConfigError, match="all requests of the trace come at the same time"):
        speed_for(0.5, trace[:1], cluster("replicated"))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"pools": ()}, "there are no workers"),
        ({"pools": (Pool(Role.DECODE, KIND, 2),)}, "needs a prefill worker"),
        ({"link_bytes_per_s": 0.0}, "--link is 0"),
        ({"deaths": (Death(1.0, "mixed-9"),)}, "worker mixed-9 is to die, and is not there"),
        ({"pools": (Pool(Role.MIXED, replace(KIND, kv_tokens=20), 2),)}, "holds no two blocks"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Cluster(**({"policy": "disaggregated", "pools": (Pool(Role.MIXED, KIND, 2),)} | fields))


def test_blocks_that_the_device_has_lost_are_loaded_from_a_tier_where_that_is_quicker() -> None:
    """Memory for one prompt at a time: the second of each pair finds its beginning in the store, or not at all."""
    trace = [replace(request, hash_ids=(*range(4), 9_000 + n, 80_000 + n)) for n, request in enumerate(conversation(8))]
    others = [replace(request, at=request.at + 2.0, hash_ids=()) for request in trace]
    asked = sorted([*trace, *others], key=lambda request: request.at)
    small = replace(KIND, kv_tokens=3_072)
    found = {}
    for name, bandwidth in (("none", 0.0), ("quick", 1e10), ("slow", 1e5)):
        tiers = (
            (TierPlan(tier=Tier.HOST, capacity_bytes=1 << 30, cost=LinkCost(0.001, bandwidth)),) if bandwidth else ()
        )
        given = cluster("replicated", 1, small, block_tokens=512, tiers=tiers)
        outcome = Simulation(given).offer(trace_talks(asked, 512), None)
        assert outcome.violations == [] and all(not record.error for record in outcome.run.records)
        found[name] = sum(record.cached for record in outcome.run.records)
    assert found["none"] == found["slow"] == 0
    assert found["quick"] == 7 * 2048
