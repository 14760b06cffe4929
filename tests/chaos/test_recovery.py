"""A fault in each phase of a request's life: its tokens, and those of all others, are exact, and nothing is leaked."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.cases import CASES, KILLED, NOTES, UNTOLD, Case
from chaos.recovery import PROMPT, Bench, Figures, Others, Outcome, bench, served
from support.cluster import Cluster

FINDABLE = (PROMPT - 1) // 16 * 16
"""Tokens of a prompt in whole blocks, but for the last token, which is computed anew."""
QUICK = {
    "prefilling-prefill-kill_-9",
    "transferring-prefill-kill_-9",
    "committed-decode-kill_-9",
    "decoding-decode-kill_-9",
    "decoding-decode-kill_-9,_nobody_tells",
    "decoding-decode-step_hangs",
    "decoding-router_link-last_token_lost",
}

PATIENCE_S = 20.0
TRIES = 3


@pytest.fixture(scope="module")
def cluster_of(smollm2: Path) -> Iterator[Callable[[Case], tuple[Cluster, Path]]]:
    """One at a time, whose parent does what the case is for; another is started where a case needs it."""
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[Cluster, Path]] = {}

        def cluster_of(case: Case) -> tuple[Cluster, Path]:
            if case.parent not in running:
                running.clear()
                stack.close()
                running[case.parent] = stack.enter_context(served(parent=case.parent))
            return running[case.parent]

        yield cluster_of


def of(case: Case) -> object:
    """Those that take long, or differ little from others, are left to `make test-all`."""
    return pytest.param(case, id=case.id, marks=() if case.id in QUICK else pytest.mark.full)


async def given_up(cluster: Cluster, pid: int) -> str:
    """Why the router counts that worker as lost."""
    deadline = time.monotonic() + PATIENCE_S
    lost = re.compile(rf"worker \S+ \(pid {pid}\) (has ended: .*|sent no heartbeat .*|was replaced .*)")
    while not (why := lost.findall(cluster.log.read_text())):
        assert time.monotonic() < deadline, "the router has not missed it"
        await asyncio.sleep(0.1)
    assert len(why) == 1
    return str(why[0])


async def complaints(case: Case, cluster: Cluster, made: Bench, outcome: Outcome) -> list[str]:
    """What a fault has done that it may not do; a machine that stands still for seconds may do it as well."""
    if outcome.struck is None:
        return ["the fault has met no occasion"]
    found_out = []
    if outcome.wait_s >= case.bound_s:
        found_out.append(f"{outcome.wait_s:.1f} s without a token")
    if case.is_felt and len(made.attempts(outcome.one)) == 1:
        found_out.append("it went on as if nothing had happened")
    if case.leaves_kv:
        placed = [made.attempts(outcome.one), *(made.attempts(other) for other in outcome.others)]
        found = [each[-1] for each in placed if len(each) > 1]
        if min(found, default=0) < FINDABLE:
            found_out.append(f"KV was there, and not used: {found}")
    elsewhere = [other for other in outcome.others if outcome.struck.worker not in other.route]
    if any(len(made.attempts(other)) > 1 for other in elsewhere):
        found_out.append("a stream on another worker was placed again")
    if case.parent == "deaf" and "nothing listens" not in (why := await given_up(cluster, outcome.struck.pid)):
        found_out.append(f"the router has not found out by itself, or because heartbeats were missed for long: {why}")
    return found_out


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", [of(case) for case in sorted(CASES, key=lambda case: case.parent)])
def test_no_token_is_wrong_or_late_and_no_block_is_leaked(
    case: Case, cluster_of: Callable[[Case], tuple[Cluster, Path]]
) -> None:
    cluster, folder = cluster_of(case)

    async def scenario(made: Bench) -> None:
        said: list[list[str]] = []
        while len(said) < TRIES and (not said or said[-1]):
            outcome = await made.befall(case)
            assert outcome.wrong == []
            said.append(await complaints(case, cluster, made, outcome))
            await made.settled()
        assert said[-1] == [], said

    async def run() -> None:
        async with bench(cluster, folder) as made:
            await scenario(made)

    asyncio.run(run())


def test_a_median_beyond_its_promise_is_told() -> None:
    """One late round of three is the machine's doing, two are not; what is usual at that point does not count."""
    figures, case = Figures(), next(case for case in CASES if case.fault == UNTOLD and case.phase == "decoding")
    figures.waits[NOTES[case.at].id] = [0.5]
    figures.waits[case.id] = [1.0, 2.4, 9.0]
    assert list(figures.broken_promises()) == []
    figures.waits[case.id] = [1.0, 2.6, 2.7]
    assert list(figures.broken_promises()) == [f"{case.id}: 2.10 s at the median, and 2 s were promised"]


def test_other_streams_that_wait_for_more_than_computing_again_are_told() -> None:
    """512 tokens, the most of a step, take 77 ms in the mock's model."""

    def others(killed_s: float, later_s: float) -> list[str]:
        whole, later = Figures(), Figures()
        killed = next(case.id for case in CASES if case.fault == KILLED and case.phase == "decoding")
        whole.others[NOTES["decoding"].id], whole.others[killed], later.others[killed] = [0.02], [killed_s], [later_s]
        return list(Others(whole, later).broken_promises())

    assert others(0.096, 0.096) == []
    assert [told.split(":")[0] for told in others(0.098, 0.096)] == ["kill -9"]
    assert [told.split(":")[0] for told in others(0.096, 0.098)] == ["kill -9, its successor started later"]
