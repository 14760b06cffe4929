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
TRIES = 5
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
    """The router still counts on a peer that has just been paused or killed, and has it asked for the prefix.

    A prompt waits for its fetch only for a tenth of what computing it takes, so on a busy machine one may be computed.
    """
    third, second, *fresh = [reference for reference in references if 200 <= len(reference.prompt) <= 700]
    assert len(fresh) == TRIES
    with serve("smollm2", *IN_TURN, "--dtype", "float32", "--kv-memory", "128MiB") as cluster:
        total = 0
        for first in fresh:
            answers = [ask(cluster, first) for _ in range(2)]
            assert answers[0]["route"] != answers[1]["route"]
            assert fetched(answers[0]) == 0
            if total := fetched(answers[1]):
                break
        assert total > 0, "no prompt was fetched"
        cluster.wait(
            lambda state: sum(each["fetches"]["hit_tokens"] for each in state["workers"]) == total,
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
        counts: list[int] = []
        for start in range(500, 500 + 2000 * TRIES, 2000):
            prompt = list(range(start, start + 1000))
            answers = [cluster.complete(prompt, max_tokens=OUTPUT, ignore_eos=True) for _ in range(2)]
            assert answers[0]["choices"][0]["token_ids"] == answers[1]["choices"][0]["token_ids"]
            counts.append(fetched(answers[1]))
            if not fetches or counts[-1] > 900:
                break
        assert counts[-1] > 900 if fetches else counts == [0], counts
        cluster.wait_idle()
