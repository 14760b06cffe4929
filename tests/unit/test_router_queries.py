"""What the router tells a policy of a request, and what it learns from those that have ended."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.test_router_service import item, offer

from bascule.kv.hashing import salt_of
from bascule.router.flight import Flight
from bascule.router.queries import Queries
from bascule.router.view import ClusterView
from bascule.types import CostModel, Placement, Request, RequestId, Role, SamplingParams, Slo, WorkerId

SLO = Slo(2.0, 0.05, 0.2)


def flight(tokens: int = 10, max_tokens: int = 100, **changes: Any) -> Flight:
    values: dict[str, Any] = {
        "id": RequestId("r"),
        "prompt": tuple(range(tokens)),
        "sampling": SamplingParams(max_tokens=max_tokens),
        "timeout": 60.0,
    }
    return Flight(Request(**(values | changes)), 5.0, 65.0, lambda flight: None)


def cluster() -> tuple[ClusterView, Queries]:
    view = ClusterView()
    view.add(offer("a", Role.MIXED, cost=CostModel(step_s=0.1, token_s=0.01)), 0.0)
    view.add(offer("b", Role.MIXED), 0.0)
    return view, Queries(view, SLO)


def end(queries: Queries, length: int, where: str = "a", **changes: Any) -> None:
    """A request that ended after `length` tokens."""
    ended = flight(**changes)
    ended.place(Placement(WorkerId(where), WorkerId(where)), 10, 10.0)
    for position in range(length):
        ended.take(item(position, 7))
    queries.ended(ended)


def test_a_query_says_what_there_is_to_compute_and_how_long_it_has_waited() -> None:
    view, queries = cluster()
    query = queries.query(flight(30), now=6.5)
    assert (query.prompt_tokens, query.max_tokens, query.waited_s) == (30, 100, 1.5)
    assert (query.slo, query.gap_planned_s) == (SLO, SLO.gap_s)
    assert len(query.cached) == len(view.columns.ids)
    assert view.card is not None
    assert query.kv_token_bytes * view.card.layout.block_size == view.card.layout.block_bytes


def test_a_request_brings_bounds_of_its_own_but_workers_cut_chunks_by_the_clusters() -> None:
    _, queries = cluster()
    own = Slo(9.0, 9.0, 9.0)
    query = queries.query(flight(slo=own), now=5.0)
    assert (query.slo, query.gap_planned_s) == (own, SLO.gap_s)


def test_tokens_that_the_client_has_are_part_of_what_another_attempt_computes() -> None:
    _, queries = cluster()
    again = flight(10)
    again.place(Placement(WorkerId("a"), WorkerId("a")), 10, 10.0)
    for position in range(4):
        again.take(item(position, 7))
    query = queries.query(again, now=5.0)
    assert (query.prompt_tokens, query.max_tokens) == (again.known_tokens, 96)


def test_blocks_are_hashed_but_for_the_last_token_whose_logits_are_wanted() -> None:
    view, queries = cluster()
    assert view.card is not None
    size = view.card.layout.block_size
    hashes = []
    for tokens in (size, size + 1, 2 * size + 1):
        asked = flight(tokens)
        queries.prepare(asked)
        hashes.append(asked.hashes)
    assert [len(each) for each in hashes] == [0, 1, 2]
    assert hashes[2][:1] == hashes[1]


def test_without_a_worker_there_is_nothing_to_hash_or_to_reckon_with() -> None:
    queries = Queries(ClusterView(), SLO)
    queries.prepare(flight())
    assert queries.work_s(flight()) == 0.0
    assert queries.query(flight(), now=5.0).kv_token_bytes == 0


def test_work_is_reckoned_with_the_first_workers_costs() -> None:
    assert cluster()[1].work_s(flight(30)) == pytest.approx(0.1 + 30 * 0.01)


def test_the_output_to_be_expected_is_what_outputs_have_lately_been_and_no_more_than_asked_for() -> None:
    _, queries = cluster()
    assert queries.output_tokens(flight()) == 64.0
    for length in (10, 20, 90):
        end(queries, length)
    assert queries.output_tokens(flight()) == 20.0
    assert queries.output_tokens(flight(max_tokens=5)) == 5.0


def test_old_outputs_are_forgotten() -> None:
    _, queries = cluster()
    for length in [3] * 200 + [5] * 256:
        end(queries, length)
    assert queries.output_tokens(flight()) == 5.0


def test_a_conversation_is_remembered_by_the_worker_that_answered_last() -> None:
    view, queries = cluster()
    end(queries, 1, "a", session="s")
    end(queries, 1, "b", session="s")
    assert queries.query(flight(session="s"), now=5.0).session == view.members[WorkerId("b")].row
    assert queries.query(flight(session="t"), now=5.0).session == -1
    assert queries.query(flight(), now=5.0).session == -1
    view.remove(WorkerId("b"))
    assert queries.query(flight(session="s"), now=5.0).session == -1


def test_only_so_many_conversations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bascule.router.queries._SESSIONS", 2)
    _, queries = cluster()
    for name in ("one", "two", "one", "three"):
        end(queries, 1, session=name)
    known = [queries.query(flight(session=name), now=5.0).session >= 0 for name in ("one", "two", "three")]
    assert known == [True, False, True]


def test_what_is_cached_for_one_tenant_is_not_for_another() -> None:
    view, queries = cluster()
    assert view.card is not None
    size, row = view.card.layout.block_size, view.members[WorkerId("a")].row
    salts = {name: salt_of(name) for name in ("", "ann", "ben")}
    asked = {name: flight(3 * size + 1, salt=salt) for name, salt in salts.items()}
    for each in asked.values():
        queries.prepare(each)
    assert len({name for each in asked.values() for name in each.hashes}) == 9
    place = Placement(WorkerId("a"), WorkerId("a"))
    view.expect(place, asked["ann"].hashes, 5.0)
    cached = {name: int(queries.query(each, 5.0).cached[row]) for name, each in asked.items()}
    assert cached == {"": 0, "ann": 3 * size, "ben": 0}


def test_a_conversation_is_its_tenants_whatever_others_call_theirs() -> None:
    view, queries = cluster()
    end(queries, 3, "a", session="chat", salt=salt_of("ann"))
    rows = [queries.query(flight(session="chat", salt=salt_of(name)), 5.0).session for name in ("", "ann", "ben")]
    assert rows == [-1, view.members[WorkerId("a")].row, -1]
