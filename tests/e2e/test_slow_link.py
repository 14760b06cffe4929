"""Two workers on two hosts: network namespaces of this machine, joined by a slow cable."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from bascule.bench.apart import Apart, Piece, running_apart
from bascule.bench.namespaces import Cable, two_hosts
from support.cluster import serve

TOKENS, LENGTHS = 16, (60, 300)
EXACT = ("--dtype=float32", "--slo-tpot=inf", "--slo-gap=inf", "--kv-memory=256MiB")
COLD = "--no-prefix-cache"
KV_BYTES = sum(LENGTHS) * 46_080
"""Of all prompts, in float32."""


def prompt(length: int) -> list[int]:
    return [1000 + 37 * place % 30_000 for place in range(length)]


@pytest.fixture(scope="module")
def undivided(smollm2: Path) -> list[list[int]]:
    """What one worker alone answers."""
    with serve("smollm2", "--policy", "single", *EXACT, COLD) as cluster:
        answers = [cluster.complete(prompt(length), max_tokens=TOKENS, ignore_eos=True) for length in LENGTHS]
    return [answer["choices"][0]["token_ids"] for answer in answers]


@contextmanager
def split(cable: Cable, folder: Path, *flags: str, handoff: str = "push") -> Iterator[Apart]:
    """A prefill worker on the near host and a decode worker on the far one; all end well, and nothing was refused."""
    front = ("--policy=disaggregated", f"--handoff={handoff}")
    pieces = [
        Piece("prefill-0", "prefill", cable.near, "cpu:0", (*EXACT, *flags)),
        Piece("decode-0", "decode", cable.far, "cpu:1", (*EXACT, *flags)),
    ]
    with running_apart(cable, "smollm2", 8100, pieces, folder, *front) as cluster:
        yield cluster
        cluster.wait_idle()
        assert not any(worker["handoff_refused"] for worker in cluster.state()["workers"])
        assert cluster.stop() == [0, 0, 0]


def answers(cable: Cable, cluster: Apart) -> tuple[list[list[int]], int]:
    """Tokens of the answers to all prompts, and the bytes that crossed the cable meanwhile."""
    before = cable.sent()
    found = [cluster.complete(prompt(length), TOKENS) for length in LENGTHS]
    assert {route for _, route in found} == {"remote;prefill=prefill-0;decode=decode-0"}
    return [tokens for tokens, _ in found], cable.sent() - before


def test_a_handoff_over_a_slow_link_leaves_the_tokens_as_they_are(
    cable: Cable, undivided: list[list[int]], tmp_path: Path
) -> None:
    with split(cable, tmp_path, COLD) as cluster:
        for megabits in (1000, 100):
            cable.limit(megabits * 1e6)
            tokens, crossed = answers(cable, cluster)
            assert tokens == undivided
            assert crossed > KV_BYTES


@pytest.mark.full
def test_a_codec_sends_less_over_a_slow_link_and_does_so_alike_at_every_rate(cable: Cable, tmp_path: Path) -> None:
    with split(cable, tmp_path, COLD, "--transfer-codec=int8") as cluster:
        found = []
        for megabits in (1000, 100):
            cable.limit(megabits * 1e6)
            tokens, crossed = answers(cable, cluster)
            found.append(tokens)
            assert all(len(each) == TOKENS for each in tokens)
            assert crossed < KV_BYTES / 2
        assert found[0] == found[1]


def test_a_handoff_goes_by_way_of_a_store_that_is_quicker_than_the_link(cable: Cable, tmp_path: Path) -> None:
    """The directory stands for storage that both hosts reach otherwise than over the cable."""
    tier = f"--kv-disk={tmp_path / 'kv'}:1GiB"
    prompts = [[1000 + (37 + seed) * place % 30_000 for place in range(300)] for seed in range(6)]
    cable.limit(100e6)
    with split(cable, tmp_path, tier, handoff="auto") as cluster:
        tokens = [cluster.complete(prompts[0], TOKENS)[0]]
        assert not store_handoffs(cluster), "a link that nobody has used counts as quick"
        while not store_handoffs(cluster) and len(tokens) < len(prompts):
            tokens.append(cluster.complete(prompts[len(tokens)], TOKENS)[0])
        assert store_handoffs(cluster) > 0
    with serve("smollm2", "--policy", "single", *EXACT) as alone:
        for asked, expected in zip(prompts, tokens, strict=False):
            answer = alone.complete(asked, max_tokens=TOKENS, ignore_eos=True)
            assert answer["choices"][0]["token_ids"] == expected


def store_handoffs(cluster: Apart) -> int:
    lines = cluster.ask("GET", f"{cluster.url}/metrics")[0].decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("bascule_store_handoffs_total")).split()[-1]))


def test_a_link_is_as_fast_as_it_is_told_to_be(cable: Cable) -> None:
    cable.limit(20e6)
    slow = median(cable.measured(0.5) for _ in range(5))
    cable.limit(200e6)
    assert 10e6 < slow < 22e6
    assert median(cable.measured(0.5) for _ in range(5)) > 3 * slow


def test_hosts_reach_each_other_and_nobody_else(cable: Cable) -> None:
    with cable.far.inside():
        listening = socket.create_server((cable.far.address, 0))
    with listening, cable.near.inside():
        socket.create_connection(listening.getsockname(), timeout=5).close()
        with pytest.raises(OSError, match="unreachable"):
            socket.create_connection(("198.51.100.1", 80), timeout=5)


@pytest.mark.usefixtures("hosts_can_be_made")
def test_nothing_is_left_of_the_hosts() -> None:
    before = namespaces()
    with pytest.raises(ZeroDivisionError), two_hosts() as made:
        ours = {made.near.inode, made.far.inode}
        with made.near.inside():
            assert namespaces() - before == ours
            1 / 0  # noqa: B018
    assert namespaces() == before
    assert not ours & before
    assert not os.path.isdir("/run/netns") or not os.listdir("/run/netns")


def namespaces() -> set[int]:
    """Network namespaces that threads of this process are in or that it holds open."""
    links = [*Path("/proc/self/task").glob("*/ns/net"), *Path("/proc/self/fd").iterdir()]
    named = [os.readlink(link) for link in links if link.is_symlink()]
    return {int(name[5:-1]) for name in named if name.startswith("net:[")}
