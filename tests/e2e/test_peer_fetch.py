"""What one worker has computed another one fetches; the tokens are the reference's, whatever becomes of the peer."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.types import CostModel
from support.cluster import Cluster, serve
from support.oracle import Reference

OUTPUT = 6
IN_TURN = ["--policy", "round-robin", "--mixed", "2"]


def fetched(answer: dict[str, Any]) -> int:
    """Prompt tokens that came from another worker."""
    return int(answer["usage"]["prompt_tokens_details"].get("loaded_tokens", {}).get("peer", 0))


def ask(cluster: Cluster, reference: Reference) -> dict[str, Any]:
    answer = cluster.complete(reference.prompt, max_tokens=OUTPUT, ignore_eos=True)
    reference.check(answer["choices"][0]["token_ids"], "fetched from a peer", OUTPUT)
    return answer


@pytest.mark.timeout(300)
def test_workers_in_turn_compute_a_prompt_once_and_one_that_hangs_or_dies_loses_nothing(
    references: list[Reference],
) -> None:
    """The router still counts on a peer that has just been paused or killed, and has it asked for the prefix."""
    third, second, first = [reference for reference in references if 200 <= len(reference.prompt) <= 600][:3]
    with serve("smollm2", *IN_TURN, "--dtype", "float32", "--kv-memory", "128MiB") as cluster:
        answers = [ask(cluster, first) for _ in range(2)]
        assert answers[0]["route"] != answers[1]["route"]
        assert [fetched(answer) > 0 for answer in answers] == [False, True]
        cluster.wait(
            lambda state: sum(each["fetches"]["hit_tokens"] for each in state["workers"]) == fetched(answers[1]),
            "the fetch in the figures",
        )
        hung = cluster.pid(ask(cluster, second)["route"].rpartition("=")[2])
        os.kill(hung, signal.SIGSTOP)
        try:
            ask(cluster, second)
        finally:
            os.kill(hung, signal.SIGCONT)
        killed = cluster.pid(ask(cluster, third)["route"].rpartition("=")[2])
        os.kill(killed, signal.SIGKILL)
        ask(cluster, third)
        cluster.wait(
            lambda state: len(state["workers"]) == 2 and all(each["pid"] != killed for each in state["workers"]),
            "a new worker",
            90,
        )
        for reference in (first, second, third):
            ask(cluster, reference)
        cluster.wait_idle()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("flags", "fetches"), [(["--transfer", "tcp"], True), (["--no-peer-fetch"], False)])
def test_peers_fetch_over_tcp_and_not_at_all_where_they_are_told_not_to(
    tmp_path: Path, flags: list[str], fetches: bool
) -> None:
    cost = tmp_path / "cost.json"
    cost.write_bytes(msgspec.json.encode(CostModel(step_s=0.001, token_s=0.001)))
    with serve("smollm2", *IN_TURN, "--engine", "mock", "--cost-model", str(cost), *flags) as cluster:
        prompt = list(range(500, 1500))
        answers = [cluster.complete(prompt, max_tokens=OUTPUT, ignore_eos=True) for _ in range(2)]
        assert answers[0]["choices"][0]["token_ids"] == answers[1]["choices"][0]["token_ids"]
        assert (fetched(answers[1]) > 900) == fetches
        cluster.wait_idle()
