"""`bascule explain` right after `bascule serve`: the id of a response is enough."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.cluster import Cluster, run_cli, serve

TERMS = {"queue_s", "load_s", "prefill_s", "transfer_s", "ttft_s", "tpot_s", "gap_s", "harm_s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the server leaves its address: other servers of this machine are not seen."""
    path = tmp_path_factory.mktemp("runtime")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    cost = folder / "cost.json"
    cost.write_text('{"step_s": 0.01, "token_s": 0.0002}')
    flags = ["--engine", "mock", "--cost-model", str(cost), "--policy", "adaptive"]
    with serve("smollm2", *flags, "--decision-log", str(folder / "log")) as running:
        yield running
    assert not list((folder / "bascule").glob("*.json")), "the server left its address behind"


def complete(cluster: Cluster, headers: dict[str, str] | None = None, **fields: Any) -> tuple[str, str]:
    """A completion's id and route, as its client sees them."""
    body = {"model": cluster.model, "prompt": [7] * 100, "max_tokens": 20, "ignore_eos": True, **fields}
    answer = cluster.http.post(f"{cluster.url}/v1/completions", json=body, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Request-Id"], answer.headers["X-Bascule-Route"]


def test_a_request_is_explained_by_the_id_that_its_client_has(cluster: Cluster) -> None:
    # Tokens that arrive together after a moment's standstill are few among so many.
    request_id, route = complete(cluster, max_tokens=300)
    shown = run_cli("explain", request_id)
    assert shown.returncode == 0, shown.stderr
    assert re.search(rf"chosen.*{route}", shown.stdout) and "TTFT" in shown.stdout
    record = json.loads(run_cli("explain", request_id, "--json", "-").stdout)
    assert record["chosen"] == route and record["reason"]
    assert route in [candidate["placement"] for candidate in record["candidates"]]
    assert all(candidate["predicted"].keys() == TERMS for candidate in record["candidates"])
    actual = record["actual"]
    assert (actual["output_tokens"], actual["finish"]) == (300, "length")
    assert 0 < actual["ttft_s"] < actual["e2e_s"] and 0.005 < actual["tpot_s"] <= actual["gap_s"]


def test_the_clients_own_id_and_bounds_are_found_again(cluster: Cluster) -> None:
    headers = {"X-Request-Id": "my call/7", "X-SLO-TTFT": "9", "X-Session-Id": "talk"}
    complete(cluster, headers, n=2, priority=4)
    record = json.loads(run_cli("explain", "my call/7", "--admin", cluster.ready["admin_url"], "--json", "-").stdout)
    assert [each["output"] for each in record["outputs"]] == [0, 1]
    assert record["slo"] == {"ttft_s": 9.0, "tpot_s": 0.06, "gap_s": 0.2}
    assert (record["session"], record["priority"]) == ("talk", 4)


def test_an_unknown_id_and_a_server_that_is_not_there_are_exit_code_1(cluster: Cluster) -> None:
    unknown = run_cli("explain", "nobody")
    assert unknown.returncode == 1 and "X-Request-Id" in unknown.stderr
    absent = run_cli("explain", "nobody", "--admin", "http://127.0.0.1:1")
    assert absent.returncode == 1 and "cannot reach" in absent.stderr
    assert run_cli("explain").returncode == 2
    assert run_cli("explain", "x", "--admin", "nowhere").returncode == 2


def test_with_two_servers_the_user_is_asked_which(cluster: Cluster) -> None:
    with serve("smollm2", "--engine", "mock", "--policy", "single") as second:
        asked = run_cli("explain", "x")
        assert asked.returncode == 2
        assert all(one.ready["admin_url"] in asked.stderr for one in (cluster, second))


def test_the_prediction_error_is_a_metric(cluster: Cluster) -> None:
    complete(cluster)
    text = cluster.http.get(f"{cluster.url}/metrics").text
    for term in ("ttft", "tpot"):
        assert re.search(rf'bascule_prediction_error_ratio{{term="{term}"}} [0-9.]+', text)
    assert re.search(r'bascule_decisions_total{kind="(local|remote)"} [1-9]', text)


def test_the_log_has_a_line_for_every_request_and_no_token(folder: Path) -> None:
    prompt = [31_000 + number for number in range(50)]
    path = folder / "own-log"
    with serve("smollm2", "--engine", "mock", "--policy", "single", "--decision-log", str(path)) as cluster:
        ids = [complete(cluster, prompt=prompt)[0] for _ in range(3)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert len({tuple(line["blocks"]) for line in lines}) == 1 and len(lines[0]["blocks"]) == 3
    assert not re.search(r"(?<![0-9.])310[0-4][0-9](?![0-9])", path.read_text())


def test_a_log_that_cannot_be_written_is_refused_at_start(tmp_path: Path) -> None:
    result = run_cli(
        "serve", "smollm2", "--port", "0", "--engine", "mock", "--decision-log", str(tmp_path / "no" / "x")
    )
    assert result.returncode == 2 and "decision-log" in result.stderr
