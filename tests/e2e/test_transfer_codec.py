"""The real model, handed over through a codec: the same answers each time, fewer bytes, never beside exact KV."""

from __future__ import annotations

import pytest

from support.cluster import Cluster, run_cli, serve
from support.oracle import Reference

OUTPUT = 12
TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
"""KV of one token in float32."""


def answers(cluster: Cluster, asked: list[Reference]) -> list[list[int]]:
    """Token ids, one request after the other; each must have been handed over."""
    found = []
    for one in asked:
        answer = cluster.complete(one.prompt, max_tokens=OUTPUT, ignore_eos=True)
        assert answer["route"].startswith("remote"), answer["route"]
        found.append(answer["choices"][0]["token_ids"])
    return found


def sent(cluster: Cluster) -> int:
    """Bytes of KV that have gone over TCP; none was refused."""
    state = cluster.wait_idle()
    [prefill] = [worker for worker in state["workers"] if worker["role"] == "prefill"]
    assert not any(worker["handoff_refused"] for worker in state["workers"])
    assert list(prefill["handoff_bytes"]) == ["tcp"]
    return int(prefill["handoff_bytes"]["tcp"])


@pytest.mark.timeout(300)
def test_answers_over_int8_are_the_same_each_time_and_never_share_kv_with_exact_ones(
    references: list[Reference],
) -> None:
    asked = [one for one in references if 200 <= len(one.prompt) <= 400]
    flags = ["--dtype", "float32", "--transfer", "tcp"]
    with serve("smollm2", "--policy", "disaggregated", *flags, "--transfer-codec", "int8") as cluster:
        coded = answers(cluster, asked)
        moved = sent(cluster)
        assert 0.25 < moved / (TOKEN_BYTES * sum(len(one.prompt) for one in asked)) < 0.4
        assert answers(cluster, asked) == coded, "the second time most of it is found where it decodes"
        other = run_cli(
            "worker", "smollm2", "--join", cluster.worker_socket(), "--id", "exact", "--device", "cpu:1", *flags
        )
        assert other.returncode == 1
        assert "KV codecs none instead of push-int8; start all workers with the same" in other.stderr, other.stderr
    for one, output in zip(asked, coded, strict=True):
        assert output[0] == one.output[0], "the first token is drawn from exact KV"
    alike = sum(one.disagreement(output) is None for one, output in zip(asked, coded, strict=True))
    assert 2 * alike >= len(asked), "what int8 loses changes most outputs"
