"""Two workers on two hosts: network namespaces of this machine, joined by a slow cable."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bascule.bench.apart import Apart, Piece, running_apart
from bascule.bench.namespaces import Cable, two_hosts, why_not
from support.cluster import serve

TOKENS, LENGTHS = 16, (60, 300)
EXACT = ("--dtype=float32", "--slo-tpot=inf", "--slo-gap=inf", "--no-prefix-cache", "--kv-memory=256MiB")
KV_BYTES = sum(LENGTHS) * 46_080
"""Of all prompts, in float32."""


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts cannot be made within this machine: {reason}")
    with two_hosts() as made:
        yield made


def prompt(length: int) -> list[int]:
    return [1000 + 37 * place % 30_000 for place in range(length)]


@pytest.fixture(scope="module")
def undivided(smollm2: Path) -> list[list[int]]:
    """What one worker alone answers."""
    with serve("smollm2", "--policy", "single", *EXACT) as cluster:
        answers = [cluster.complete(prompt(length), max_tokens=TOKENS, ignore_eos=True) for length in LENGTHS]
    return [answer["choices"][0]["token_ids"] for answer in answers]


@contextmanager
def split(cable: Cable, folder: Path, *flags: str) -> Iterator[Apart]:
    """A prefill worker on the near host and a decode worker on the far one; all end well, and nothing was refused."""
    pieces = [
        Piece("prefill-0", "prefill", cable.near, "cpu:0", (*EXACT, *flags)),
        Piece("decode-0", "decode", cable.far, "cpu:1", (*EXACT, *flags)),
    ]
    with running_apart(cable, "smollm2", 8100, pieces, folder, "--policy=disaggregated") as cluster:
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
    with split(cable, tmp_path) as cluster:
        for megabits in (1000, 100):
            cable.limit(megabits * 1e6)
            tokens, crossed = answers(cable, cluster)
            assert tokens == undivided
            assert crossed > KV_BYTES


def test_a_codec_sends_less_over_a_slow_link_and_does_so_alike_at_every_rate(cable: Cable, tmp_path: Path) -> None:
    with split(cable, tmp_path, "--transfer-codec=int8") as cluster:
        found = []
        for megabits in (1000, 100):
            cable.limit(megabits * 1e6)
            tokens, crossed = answers(cable, cluster)
            found.append(tokens)
            assert all(len(each) == TOKENS for each in tokens)
            assert crossed < KV_BYTES / 2
        assert found[0] == found[1]


def test_a_link_is_as_fast_as_it_is_told_to_be(cable: Cable) -> None:
    cable.limit(20e6)
    slow = cable.measured(0.5)
    cable.limit(200e6)
    assert 10e6 < slow < 22e6
    assert cable.measured(0.5) > 3 * slow


def test_hosts_reach_each_other_and_nobody_else(cable: Cable) -> None:
    with cable.far.inside():
        listening = socket.create_server((cable.far.address, 0))
    with listening, cable.near.inside():
        socket.create_connection(listening.getsockname(), timeout=5).close()
        with pytest.raises(OSError, match="unreachable"):
            socket.create_connection(("198.51.100.1", 80), timeout=5)


def test_nothing_is_left_of_the_hosts() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(f"two hosts cannot be made within this machine: {reason}")
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
