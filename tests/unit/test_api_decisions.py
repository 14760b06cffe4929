"""`/admin/decisions`: the shape that scripts rely on, found by the id that the client has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_rig import ApiRig
from test_api_service import samples
from test_observe_decisions import LOCAL, REMOTE, attempt, record

from bascule.observe.decisions import Actual, Outcome, Record
from bascule.observe.state import RoutingFigures

TERMS = {"queue_s", "load_s", "prefill_s", "transfer_s", "ttft_s", "tpot_s", "gap_s", "harm_s"}


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


def add(rig: ApiRig, one: Record) -> Record:
    rig.records.open(one)
    rig.records.decided(one, attempt(REMOTE))
    rig.records.ended(one, Outcome.COMPLETED, Actual(ttft_s=2.0, tpot_s=0.1, gap_s=0.3, e2e_s=3.0, output_tokens=11))
    return one


def get(rig: ApiRig, path: str, status: int = 200) -> dict[str, Any]:
    answer = rig.http.get(f"{rig.admin.url}/admin/decisions{path}")
    assert answer.status_code == status, answer.text
    fields: dict[str, Any] = answer.json()
    return fields


def test_a_decision_has_the_contracts_shape(rig: ApiRig) -> None:
    add(rig, record("r"))
    fields = get(rig, "/r")
    assert fields["chosen"] == "remote;prefill=a;decode=b" and fields["reason"] == "because"
    assert [each["placement"] for each in fields["candidates"]] == ["local;decode=a", "remote;prefill=a;decode=b"]
    for candidate in fields["candidates"]:
        assert candidate["predicted"].keys() == TERMS
        assert candidate["feasible"] is True and candidate["why_not"] == ""
    assert (fields["candidates"][1]["prefill"], fields["candidates"][1]["decode"]) == ("a", "b")
    expected = {"ttft_s": 2.0, "tpot_s": 0.1, "gap_s": 0.3, "e2e_s": 3.0, "output_tokens": 11, "finish": None}
    assert expected.items() <= fields["actual"].items()
    assert fields["error_ratio"] == {"ttft": 0.5, "tpot": 0.0}


def test_a_request_that_nothing_was_decided_for_has_the_same_keys(rig: ApiRig) -> None:
    one = record("r")
    rig.records.open(one)
    one.note = "every slot is taken"
    fields = get(rig, "/r")
    assert (fields["candidates"], fields["chosen"], fields["outcome"]) == ([], None, "waiting")
    assert fields["reason"] == "every slot is taken" and fields["actual"]["ttft_s"] is None


def test_all_outputs_of_the_latest_call_with_an_id_are_listed(rig: ApiRig) -> None:
    for call, count in (("one", 1), ("two", 12)):
        for output in reversed(range(count)):
            suffix = f"-{output}" if count > 1 else ""
            add(rig, record(f"my id/1~{call}{suffix}", output, "my id/1"))
    fields = get(rig, "/my%20id%2F1")
    assert [each["backend_id"] for each in fields["outputs"]] == [f"my id/1~two-{output}" for output in range(12)]
    assert fields["backend_id"] == "my id/1~two-0"


def test_an_unknown_id_is_not_found_with_what_to_do(rig: ApiRig) -> None:
    error = get(rig, "/nothing", 404)["error"]
    assert "'nothing'" in error["message"] and "X-Request-Id" in error["message"]
    assert error["code"] == "unknown_request"


def test_the_latest_are_listed_newest_first(rig: ApiRig) -> None:
    for number in range(30):
        add(rig, record(f"r{number}"))
    listed = get(rig, "")["decisions"]
    assert len(listed) == 20
    newest = {"id": "r29", "outcome": "completed", "chosen": "remote;prefill=a;decode=b", "ttft_s": 2.0}
    assert newest.items() <= listed[0].items()
    assert [each["id"] for each in get(rig, "?limit=2")["decisions"]] == ["r29", "r28"]


@pytest.mark.parametrize("limit", ["0", "-1", "4097", "many", "1.5", "", "٣", "9" * 5000])
def test_a_bad_limit_is_refused(rig: ApiRig, limit: str) -> None:
    assert get(rig, f"?limit={limit}", 400)["error"]["param"] == "limit"


def test_decisions_are_on_the_admin_port_only(rig: ApiRig) -> None:
    add(rig, record("r"))
    assert rig.http.get("/admin/decisions/r").status_code == 404


def test_the_metrics_say_what_was_decided_and_how_far_predictions_were_off(rig: ApiRig) -> None:
    one = record("late")
    rig.records.open(one)
    rig.records.decided(one, attempt(LOCAL))
    rig.records.rejected(record("full"), "queue", "full")
    rig.records.ended(one, Outcome.COMPLETED, Actual(ttft_s=4.0, tpot_s=0.2))
    rig.backend.routing = rig.records.figures(policy_failures=2, log_lost=5)
    values = samples(rig.http.get("/metrics").text)
    assert values['bascule_prediction_error_ratio{term="ttft"}'] == 0.75
    assert values['bascule_prediction_error_ratio{term="tpot"}'] == 0.5
    assert values['bascule_decisions_total{kind="local"}'] == 1
    assert values['bascule_rejected_total{reason="queue"}'] == 1
    assert values["bascule_policy_failures_total"] == 2
    assert values["bascule_decision_log_lost_total"] == 5
    assert values['bascule_kv_event_faults_total{kind="gap"}'] == 3
    rig.backend.routing = RoutingFigures()
    assert samples(rig.http.get("/metrics").text)["bascule_policy_failures_total"] == 0
