"""`/admin/workers`: what an operator may ask of a worker, and how what cannot be done is answered."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from api_rig import LOAD, ApiRig
from test_api_service import samples


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


def post(rig: ApiRig, path: str, **options: object) -> httpx.Response:
    return rig.http.post(f"{rig.admin.url}/admin/workers/{path}", **options)  # type: ignore[arg-type]


def test_a_worker_is_drained_and_answered_as_in_the_state(rig: ApiRig) -> None:
    answer = post(rig, "mixed-0/drain", json={"timeout": 2.5})
    assert answer.status_code == 200 and rig.backend.operations == [("drain", 2.5)]
    assert answer.json() == rig.http.get(f"{rig.admin.url}/admin/state").json()["workers"][0]
    assert (answer.json()["state"], answer.json()["requests"]) == ("draining", 2)
    assert answer.json()["kv_blocks_total"] == LOAD.kv_blocks_total


def test_the_body_may_be_left_out_where_nothing_has_to_be_said(rig: ApiRig) -> None:
    assert post(rig, "mixed-0/drain").json()["state"] == "draining"
    assert post(rig, "mixed-0/drain", json={"timeout": None}).status_code == 200
    assert post(rig, "mixed-0/resume").json()["state"] == "ready"
    assert rig.backend.operations == [("drain", None), ("drain", None), ("resume", None)]


def test_a_role_is_changed(rig: ApiRig) -> None:
    assert post(rig, "mixed-0/role", json={"role": "decode"}).json()["role"] == "decode"
    assert rig.backend.operations == [("role", "decode")]


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("mixed-0/drain", {"json": {"timeout": -1}}, "timeout"),
        ("mixed-0/drain", {"json": {"timeout": "soon"}}, "timeout"),
        ("mixed-0/drain", {"json": {"timeout": True}}, "timeout"),
        ("mixed-0/drain", {"content": '{"timeout": 1e999}'}, None),
        ("mixed-0/drain", {"json": {"timeuot": 1}}, "timeuot"),
        ("mixed-0/drain", {"json": [1]}, None),
        ("mixed-0/drain", {"content": "{"}, None),
        ("mixed-0/resume", {"json": {"timeout": 1}}, "timeout"),
        ("mixed-0/drain", {"headers": {"Origin": "https://example.org"}}, "Origin"),
        ("mixed-0/role", {}, "role"),
        ("mixed-0/role", {"json": {"role": "both"}}, "role"),
        ("mixed-0/role", {"json": {"role": ["decode"]}}, "role"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_done(
    rig: ApiRig, path: str, options: dict[str, object], param: str | None
) -> None:
    answer = post(rig, path, **options)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert rig.backend.operations == []


def test_other_paths_and_methods_are_told_apart(rig: ApiRig) -> None:
    unknown = post(rig, "mixed-9/drain")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_worker"
    assert "mixed-0" in unknown.json()["error"]["message"]
    assert rig.http.get(f"{rig.admin.url}/admin/workers/mixed-0/drain").status_code == 405
    assert post(rig, "mixed-0/stop").status_code == 404
    assert rig.post("/admin/workers/mixed-0/drain", {}).status_code == 404, "it is not for clients"
    assert post(rig, "mixed-0/drain", content=b" " * 5000).status_code == 413


def test_all_workers_are_reloaded_and_it_is_told_how_far_that_is(rig: ApiRig) -> None:
    begun = rig.http.post(f"{rig.admin.url}/admin/reload", json={"timeout": 30})
    assert begun.status_code == 200 and begun.json()["state"] == "running" and begun.json()["waiting"] == ["mixed-1"]
    assert rig.backend.operations == [("reload", 30.0)]
    assert rig.http.get(f"{rig.admin.url}/admin/reload").json()["done"] == 0
    assert rig.http.get(f"{rig.admin.url}/admin/reload").json() == {
        "state": "done",
        "workers": 2,
        "done": 2,
        "current": "",
        "ended": False,
        "waiting": [],
        "failure": "",
        "fingerprint": "f",
    }
    for wrong in ({"timeout": -1}, {"timeout": "soon"}, {"weights": "new"}):
        assert rig.http.post(f"{rig.admin.url}/admin/reload", json=wrong).status_code == 400
    from_page = rig.http.post(f"{rig.admin.url}/admin/reload", headers={"Origin": "http://elsewhere"})
    assert from_page.status_code == 400 and len(rig.backend.operations) == 1


def test_requests_are_taken_while_all_workers_drain_and_ready_says_so(rig: ApiRig) -> None:
    rig.backend.ready, rig.backend.draining = False, True
    ready = rig.http.get("/ready")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "draining"
    assert "bascule admin resume" in ready.json()["error"]["message"]
    assert rig.complete().status_code == 200
    rig.backend.draining = False
    assert rig.http.get("/ready").json()["error"]["code"] == "not_ready"
    assert rig.complete().status_code == 503


def test_the_metrics_count_workers_by_state(rig: ApiRig) -> None:
    post(rig, "mixed-0/drain")
    found = samples(rig.http.get("/metrics").text)
    states = {name: found[f'bascule_workers{{state="{name}"}}'] for name in ("ready", "suspect", "draining", "drained")}
    assert states == {"ready": 0, "suspect": 0, "draining": 1, "drained": 0}


LINK = {"from": "mixed-0", "to": "mixed-1", "transport": "tcp"}


def test_a_link_is_measured_with_defaults_or_as_asked_for(rig: ApiRig) -> None:
    for more, expected in (({}, (8 << 20, 5)), ({"bytes": 1 << 16, "runs": 2}, (1 << 16, 2))):
        answer = rig.http.post(f"{rig.admin.url}/admin/links", json=LINK | more)
        assert answer.status_code == 200 and answer.json()["from"] == "mixed-0", answer.text
        assert rig.backend.operations[-1] == ("link", ("mixed-0", "mixed-1", "tcp", *expected))
        assert answer.json()["bytes_per_s"] == expected[0] / 0.01


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**LINK, "transport": "rdma"}, "transport"),
        ({**LINK, "from": 1}, "from"),
        ({"from": "mixed-0", "transport": "tcp"}, "to"),
        ({**LINK, "bytes": 0}, "bytes"),
        ({**LINK, "bytes": 1 << 30}, "bytes"),
        ({**LINK, "runs": 51}, "runs"),
        ({**LINK, "run": 1}, "run"),
    ],
)
def test_a_link_that_makes_no_sense_is_not_measured(rig: ApiRig, body: dict[str, object], param: str) -> None:
    answer = rig.http.post(f"{rig.admin.url}/admin/links", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert rig.backend.operations == []
    assert rig.http.post(f"{rig.admin.url}/admin/links", json={**LINK, "from": "nobody"}).status_code == 404
