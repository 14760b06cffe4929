"""What a request's headers ask for: its own SLO, its conversation, its priority, its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_rig import SLO, ApiRig

from bascule.api.errors import error_response
from bascule.errors import Overloaded
from bascule.kv.hashing import salt_of
from bascule.types import FinishReason, Request, Slo


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> ApiRig:
    shared.backend.reset()
    return shared


def sent(rig: ApiRig, headers: dict[str, str], **fields: object) -> list[Request]:
    """What the backend is asked for."""
    answer = rig.post("/v1/completions", {"model": "tiny", "prompt": "abc", **fields}, headers=headers)
    assert answer.status_code == 200, answer.text
    return rig.backend.requests


def test_a_request_that_asks_for_nothing_has_the_defaults(rig: ApiRig) -> None:
    (request,) = sent(rig, {})
    assert (request.slo, request.session, request.priority) == (None, "", 0)


def test_an_slo_is_the_requests_own_where_given_and_the_clusters_elsewhere(rig: ApiRig) -> None:
    (request,) = sent(rig, {"X-SLO-TTFT": "0.5"})
    assert request.slo == Slo(0.5, SLO.tpot_s, SLO.gap_s)
    rig.backend.reset()
    (request,) = sent(rig, {"X-SLO-TPOT": "0.03", "X-SLO-Gap": "1e-1"})
    assert request.slo == Slo(SLO.ttft_s, 0.03, 0.1)


@pytest.mark.parametrize("name", ["X-SLO-TTFT", "X-SLO-TPOT", "X-SLO-Gap"])
@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e999", "fast", "", "1s", "1e-323", "1e308"])
def test_a_bound_that_is_no_positive_number_is_refused_by_name(rig: ApiRig, name: str, given: str) -> None:
    answer = rig.post("/v1/chat/completions", CHAT, headers={name: given})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name and name in answer.json()["error"]["message"]
    assert not rig.backend.requests


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def test_the_session_is_the_clients_own_word(rig: ApiRig) -> None:
    (request,) = sent(rig, {"X-Session-Id": "chat 7/a"})
    assert request.session == "chat 7/a"


@pytest.mark.parametrize("given", ["", "x" * 129, "a\tb", "é"])
def test_an_unusable_session_is_refused(rig: ApiRig, given: str) -> None:
    answer = rig.post("/v1/chat/completions", CHAT, headers={"X-Session-Id": given.encode()})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Session-Id"


def test_a_salt_is_made_of_cache_salt_and_keeps_it_secret(rig: ApiRig) -> None:
    plain, one, two = (sent(rig, {}, **fields)[-1] for fields in ({}, {"cache_salt": "ann's"}, {"cache_salt": "ben's"}))
    assert plain.salt == b"" and one.salt == salt_of("ann's") and len({plain.salt, one.salt, two.salt}) == 3
    assert "ann's" not in repr(one)
    answer = rig.post("/v1/chat/completions", {**CHAT, "cache_salt": "ann's"})
    assert answer.status_code == 200 and rig.backend.requests[-1].salt == one.salt
    assert {request.salt for request in sent(rig, {}, cache_salt="ann's", n=3)[-3:]} == {one.salt}


@pytest.mark.parametrize("given", ["", 3, ["x"], True])
def test_a_cache_salt_that_is_no_text_is_refused(rig: ApiRig, given: object) -> None:
    answer = rig.complete(cache_salt=given)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"


def test_the_priority_is_a_field_of_the_body(rig: ApiRig) -> None:
    (request,) = sent(rig, {}, priority=-3)
    assert request.priority == -3
    answer = rig.post("/v1/chat/completions", {**CHAT, "priority": 5})
    assert answer.status_code == 200 and rig.backend.requests[-1].priority == 5


@pytest.mark.parametrize("given", [1.5, "1", True, 10**7, -(10**7)])
def test_a_priority_that_is_no_small_integer_is_refused(rig: ApiRig, given: object) -> None:
    answer = rig.complete(priority=given)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"


def test_all_outputs_of_a_call_carry_its_public_id(rig: ApiRig) -> None:
    requests = sent(rig, {"X-Request-Id": "mine", "X-Session-Id": "s", "X-SLO-TTFT": "1"}, n=3)
    assert {request.public_id for request in requests} == {"mine"}
    assert sorted(request.output for request in requests) == [0, 1, 2]
    assert all(request.session == "s" and request.slo is not None for request in requests)


def test_the_id_that_the_server_made_is_the_public_one(rig: ApiRig) -> None:
    answer = rig.complete()
    assert rig.backend.requests[0].public_id == answer.headers["X-Request-Id"]


def test_a_stop_string_ends_the_backends_work_as_complete(rig: ApiRig) -> None:
    assert rig.complete(prompt="abcdef", max_tokens=20, stop="d").json()["choices"][0]["finish_reason"] == "stop"
    assert rig.backend.generations[0].finish is FinishReason.STOP


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0, "1"), (1.0, "1"), (1.2, "2"), (float("inf"), "3600"), (float("nan"), "1")]
)
def test_retry_after_is_a_whole_number_of_seconds(seconds: float, said: str) -> None:
    assert error_response(Overloaded("full", retry_after=seconds)).headers["Retry-After"] == said
