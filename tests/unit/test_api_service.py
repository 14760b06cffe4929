"""What surrounds the answers: models, probes, metrics, the admin application, and request ids."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from api_rig import CONTEXT, HOLD, ApiRig

from bascule.clock import VirtualClock
from bascule.errors import DeadlineExceeded, Overloaded
from bascule.observe.metrics import Metrics


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> Iterator[ApiRig]:
    shared.backend.reset()
    yield shared
    shared.assert_nothing_runs()


def samples(text: str) -> dict[str, float]:
    """Prometheus' text format as a mapping from series to value."""
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {series: float(value) for series, value in lines}


def test_the_served_model_is_listed(rig: ApiRig) -> None:
    assert [model.id for model in rig.client.models.list()] == ["tiny"]
    assert rig.client.models.retrieve("tiny").owned_by == "bascule"
    assert rig.http.get("/v1/models/tiny").json()["max_model_len"] == CONTEXT


def test_a_model_named_like_a_path_is_found(rig: ApiRig) -> None:
    assert rig.http.get("/v1/models/owner/tiny").json()["error"]["code"] == "model_not_found"


def test_no_model_is_listed_before_a_worker_has_registered(rig: ApiRig) -> None:
    rig.backend.card = None
    assert rig.http.get("/v1/models").json()["data"] == []
    assert rig.http.get("/v1/models/tiny").status_code == 503


def test_health_says_that_the_process_lives_and_ready_that_it_can_serve(rig: ApiRig) -> None:
    assert rig.http.get("/ready").status_code == 200
    rig.backend.ready = False
    assert rig.http.get("/health").status_code == 200
    response = rig.http.get("/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"


def test_the_clients_request_id_is_kept(rig: ApiRig) -> None:
    headers = {"X-Request-Id": "my request/1"}
    response = rig.post("/v1/completions", {"model": "tiny", "prompt": "a"}, headers=headers)
    assert response.headers["X-Request-Id"] == "my request/1"
    assert response.json()["id"] == "cmpl-my request/1"
    assert rig.http.get("/nothing", headers=headers).headers["X-Request-Id"] == "my request/1"


@pytest.mark.parametrize("given", ["", "x" * 129, "a\tb", "é"])
def test_an_unusable_request_id_is_replaced(rig: ApiRig, given: str) -> None:
    answered = rig.http.get("/health", headers={"X-Request-Id": given.encode()}).headers["X-Request-Id"]
    assert re.fullmatch(r"[0-9a-f]{32}", answered)


def test_a_request_id_that_comes_twice_is_two_requests_to_the_backend(rig: ApiRig) -> None:
    for _ in range(2):
        rig.post("/v1/completions", {"model": "tiny", "prompt": "a", "n": 2}, headers={"X-Request-Id": "same"})
    ids = [request.id for request in rig.backend.requests]
    assert len(set(ids)) == 4
    assert all(one.startswith("same~") for one in ids)


def test_the_admin_state_has_workers_and_sums(rig: ApiRig) -> None:
    with_admin = rig.http.get(f"{rig.admin.url}/admin/state")
    state = with_admin.json()
    assert (state["integrity_violations"], state["queued"], state["active"]) == (2, 4, 5)
    (worker,) = state["workers"]
    expected = {
        "id": "mixed-0",
        "role": "mixed",
        "state": "ready",
        "epoch": "e1",
        "pid": 7,
        "device": "cpu:0",
        "running": 1,
        "waiting": 0,
        "kv_blocks_total": 100,
        "kv_blocks_leased": 30,
        "kv_blocks_cached": 20,
        "kv_blocks_quarantined": 1,
    }
    assert expected.items() <= worker.items()
    assert with_admin.headers["X-Request-Id"]


def test_the_admin_application_is_on_its_own_port_only(rig: ApiRig) -> None:
    assert rig.http.get("/admin/state").status_code == 404
    assert rig.http.get(f"{rig.admin.url}/health").status_code == 200
    assert rig.http.get(f"{rig.admin.url}/v1/models").json()["error"]["code"] == "unknown_url"


def test_metrics_have_the_cluster_at_the_time_of_the_scrape(rig: ApiRig) -> None:
    values = samples(rig.http.get("/metrics").text)
    assert values['bascule_kv_blocks{state="leased",worker="mixed-0"}'] == 30
    assert values['bascule_kv_blocks{state="cached",worker="mixed-0"}'] == 20
    assert values['bascule_kv_blocks{state="quarantined",worker="mixed-0"}'] == 1
    assert values['bascule_kv_blocks{state="free",worker="mixed-0"}'] == 49
    assert values["bascule_integrity_violations"] == 2
    assert values['bascule_handoff_bytes_total{transport="shm"}'] == 4096
    assert values['bascule_handoff_refused_total{reason="checksum"}'] == 3
    assert values["bascule_prompt_tokens_computed_total"] == 48
    assert values['bascule_prediction_error_ratio{term="step"}'] == 0.04
    assert values["bascule_requests_queued"] == 4


def outcomes(rig: ApiRig) -> dict[str, float]:
    values = samples(rig.http.get("/metrics").text)
    return {
        series.split('"')[1]: value for series, value in values.items() if series.startswith("bascule_requests_total")
    }


def test_requests_are_counted_by_outcome(rig: ApiRig) -> None:
    before = outcomes(rig)
    rig.complete()
    rig.complete(n=2, stream=True)
    rig.complete(temperature=9)
    for error in (Overloaded("full", retry_after=1), DeadlineExceeded("late"), ZeroDivisionError()):
        rig.backend.refusal = lambda request, error=error: error
        rig.complete()
    after = outcomes(rig)
    counted = {outcome: after[outcome] - before[outcome] for outcome in after}
    assert counted == {"completed": 2, "invalid": 1, "rejected": 1, "timeout": 1, "failed": 1, "cancelled": 0}


def test_latencies_are_counted_for_every_output(rig: ApiRig) -> None:
    names = ("time_to_first_token", "time_per_output_token", "inter_token_latency")
    before = samples(rig.http.get("/metrics").text)
    rig.complete(n=2, max_tokens=5)
    after = samples(rig.http.get("/metrics").text)
    counted = [after[f"bascule_{name}_seconds_count"] - before[f"bascule_{name}_seconds_count"] for name in names]
    assert counted == [2, 2, 2 * 4]


def test_an_outputs_latencies_are_those_of_the_clock(rig: ApiRig) -> None:
    clock = VirtualClock(100.0)
    metrics = Metrics(rig.backend.state, clock)
    timer = metrics.timer(received=99.0)
    timer.delivered()
    for _ in range(4):
        clock.advance(0.5)
        timer.delivered()
    timer.ended(tokens=9)
    values = samples(metrics.exposition().decode())
    assert values["bascule_time_to_first_token_seconds_sum"] == 1.0
    assert values["bascule_inter_token_latency_seconds_sum"] == 2.0
    assert values["bascule_inter_token_latency_seconds_count"] == 4
    assert values["bascule_time_per_output_token_seconds_sum"] == 0.25


def test_a_client_that_goes_away_is_counted_as_cancelled(rig: ApiRig) -> None:
    before = outcomes(rig)["cancelled"]
    rig.backend.script = lambda request: [HOLD]
    with rig.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}):
        pass
    rig.assert_nothing_runs()
    assert outcomes(rig)["cancelled"] == before + 1
