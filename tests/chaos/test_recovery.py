"""A fault in each phase of a request's life: its tokens, and those of all others, are exact, and nothing is leaked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.recovery import CASES, PROMPT, Bench, Case, bench, served
from support.cluster import Cluster

FINDABLE = (PROMPT - 1) // 16 * 16
"""Tokens of a prompt in whole blocks, but for the last token, which is computed anew."""
QUICK = {
    "prefilling-prefill-kill_-9",
    "transferring-prefill-kill_-9",
    "committed-decode-kill_-9",
    "decoding-decode-kill_-9",
    "decoding-router_link-last_token_lost",
}


@pytest.fixture(scope="module")
def cluster(smollm2: Path) -> Iterator[tuple[Cluster, Path]]:
    with served() as running:
        yield running


def of(case: Case) -> object:
    """Those that take long, or differ little from others, are left to `make test-all`."""
    return pytest.param(case, id=case.id, marks=() if case.id in QUICK else pytest.mark.full)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", [of(case) for case in CASES])
def test_no_token_is_wrong_or_late_and_no_block_is_leaked(case: Case, cluster: tuple[Cluster, Path]) -> None:
    async def scenario(made: Bench) -> None:
        outcome = await made.befall(case)
        assert outcome.struck is not None, "the fault has met no occasion"
        assert outcome.wrong == []
        assert outcome.wait_s < case.bound_s
        if case.is_felt:
            assert len(made.attempts(outcome.one)) > 1, "it went on as if nothing had happened"
        if case.leaves_kv:
            placed = [made.attempts(outcome.one), *(made.attempts(other) for other in outcome.others)]
            found = [each[-1] for each in placed if len(each) > 1]
            assert min(found) >= FINDABLE, f"KV was there, and not used: {found}"
        for other in outcome.others:
            if outcome.struck.worker not in other.route:
                assert len(made.attempts(other)) == 1, "a stream on another worker was placed again"
        await made.settled()

    async def run() -> None:
        async with bench(*cluster) as made:
            await scenario(made)

    asyncio.run(run())
