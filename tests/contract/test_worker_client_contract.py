"""What every `WorkerClient` must keep, over a real worker on its socket and over a real server behind HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bascule.clock import WallClock
from bascule.config import AttachConfig, RoutingConfig
from bascule.models import load
from bascule.router.attached.keeper import Attachments
from bascule.router.attached.probe import OurModel
from bascule.router.client import WorkerClient
from bascule.router.link import RouterLink
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView, Member
from bascule.types import FinishReason, RequestId, SamplingParams
from bascule.wire import Failed, StepTokens, Submit, TokenItem
from support.cluster import Cluster, serve

STEP_S = 0.01
FLAGS = ("--engine", "mock", "--kv-memory", "16MiB")
ROUTING = RoutingConfig(suspect_after=10.0, dead_after=30.0)
QUICK = RoutingConfig(suspect_after=1.5, dead_after=5.0)
"""Where somebody is to be lost."""
PROMPT = (5, 6, 7, 8)


class Recorder(Service):
    """Keeps what members say instead of following requests."""

    def __init__(self, routing: RoutingConfig) -> None:
        super().__init__(ClusterView(4096), routing, WallClock())
        self.items: list[TokenItem] = []
        self.failures: list[Failed] = []
        self.gone: list[str] = []

    def tokens(self, message: StepTokens) -> None:
        self.items += message.items

    def failed(self, message: Failed) -> None:
        self.failures.append(message)

    def lost(self, member: Member, why: str) -> None:
        super().lost(member, why)
        self.gone.append(member.id)


@dataclass
class Rig:
    recorder: Recorder
    kill: Callable[[], None]

    @property
    def client(self) -> WorkerClient:
        return next(iter(self.recorder.clients.values()))

    @property
    def running(self) -> int:
        return sum(status.load.running for status in self.recorder.view.statuses())

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)

    async def rest(self) -> None:
        """Until nothing runs, by the second heartbeat from now on: the last one may be from before anything ran."""
        [member] = self.recorder.view.members.values()
        seen = member.pulse.beats
        await self.until(lambda: member.pulse.beats >= seen + 2 and self.running == 0)

    async def run(self, sampling: SamplingParams, generated: tuple[int, ...] = ()) -> list[TokenItem]:
        """One submission; its items once it has ended."""
        self.recorder.items.clear()
        self.client.submit(submission(sampling, generated))
        await self.until(lambda: self.recorder.failures or any(item.finish for item in self.recorder.items))
        return list(self.recorder.items)


def submission(sampling: SamplingParams, generated: tuple[int, ...] = (), attempt: int = 0) -> Submit:
    return Submit(request=RequestId("r"), attempt=attempt, prompt=PROMPT, generated=generated, sampling=sampling)


def greedy(max_tokens: int, **changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    cost = Path(tmp_path_factory.mktemp("cost"), "cost.json")
    cost.write_text(f'{{"step_s": {STEP_S}}}')
    return (*FLAGS, "--cost-model", str(cost))


@pytest.fixture(scope="module")
def server(flags: tuple[str, ...]) -> Iterator[Cluster]:
    """The running server that is attached; what it answers directly is what all clients must bring."""
    with serve("smollm2", *flags, "--policy", "single") as cluster:
        yield cluster


Run = Callable[[Callable[[Rig], Awaitable[None]]], None]


@pytest.fixture(params=["native", "attached"])
def run(request: pytest.FixtureRequest, flags: tuple[str, ...], server: Cluster) -> Run:
    """Runs a test with a client of that kind."""

    def runner(test: Callable[[Rig], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with _router() as (recorder, _, address):
                with contextlib.ExitStack() as stack:
                    kill = await _native(stack, address, flags)
                    await _joined(recorder)
                    await test(Rig(recorder, kill))

        async def attached() -> None:
            async with _router() as (recorder, membership, _):
                keeping = _attach(membership, server.url)
                try:
                    await _joined(recorder)
                    await test(Rig(recorder, lambda: None))
                finally:
                    keeping.cancel()
                    await asyncio.gather(keeping, return_exceptions=True)

        asyncio.run(asyncio.wait_for(inside() if request.param == "native" else attached(), 60))

    return runner


@contextlib.asynccontextmanager
async def _router(routing: RoutingConfig = ROUTING) -> AsyncIterator[tuple[Recorder, Membership, str]]:
    recorder, link = Recorder(routing), RouterLink("tcp://127.0.0.1:*")
    membership = Membership(link, recorder, routing, WallClock())
    serving = asyncio.create_task(membership.run())
    try:
        yield recorder, membership, link.address
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        link.close()


async def _native(stack: contextlib.ExitStack, join: str, flags: tuple[str, ...]) -> Callable[[], None]:
    command = [sys.executable, "-m", "bascule", "worker", "smollm2", "--join", join, "--id", "native-0", *flags]
    process = subprocess.Popen(command)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process.kill


def _attach(membership: Membership, url: str, routing: RoutingConfig = ROUTING) -> asyncio.Task[None]:
    loaded = load("smollm2")
    ours = OurModel(
        name="ours",
        vocab=loaded.spec.vocab,
        eos=frozenset(loaded.spec.eos_token_ids),
        encode=loaded.tokenizer.encode,
        decode=loaded.tokenizer.decode,
    )
    attachments = Attachments(AttachConfig(attach=url), routing, ours, membership, WallClock())
    return asyncio.create_task(attachments.run())


async def _joined(recorder: Recorder) -> None:
    async with asyncio.timeout(40):
        while not recorder.clients:
            await asyncio.sleep(0.01)


def _direct(server: Cluster, **fields: object) -> list[int]:
    tokens: list[int] = server.complete(list(PROMPT), **fields)["choices"][0]["token_ids"]
    return tokens


def test_tokens_positions_and_finish_are_the_engine_s_own(run: Run, server: Cluster) -> None:
    async def test(rig: Rig) -> None:
        items = await rig.run(greedy(12))
        assert [item.token for item in items] == _direct(server, max_tokens=12)
        assert [(item.request, item.attempt, item.position) for item in items] == [("r", 0, at) for at in range(12)]
        assert [item.finish for item in items] == [None] * 11 + [FinishReason.LENGTH]
        drawn = SamplingParams(max_tokens=6, temperature=1.0, seed=77)
        sampled = [item.token for item in await rig.run(drawn)]
        assert sampled == _direct(server, max_tokens=6, temperature=1, seed=77)

    run(test)


def test_an_output_goes_on_behind_what_is_out_already(run: Run, server: Cluster) -> None:
    async def test(rig: Rig) -> None:
        whole = _direct(server, max_tokens=9)
        items = await rig.run(greedy(9), tuple(whole[:4]))
        assert [(item.position, item.token) for item in items] == list(enumerate(whole))[4:]

    run(test)


def test_stop_tokens_end_the_output_but_not_before_the_minimum(run: Run, server: Cluster) -> None:
    async def test(rig: Rig) -> None:
        whole = _direct(server, max_tokens=9)
        items = await rig.run(greedy(9, stop_token_ids=(whole[3],)))
        assert [item.token for item in items] == whole[:4]
        assert items[-1].finish is FinishReason.STOP
        later = await rig.run(greedy(9, stop_token_ids=(whole[3],), min_tokens=6))
        assert len(later) >= 6 and later[3].token != whole[3]

    run(test)


def test_log_probabilities_come_one_a_token_with_as_many_others_as_asked(run: Run) -> None:
    async def test(rig: Rig) -> None:
        items = await rig.run(greedy(3, logprobs=2))
        assert all(item.logprobs is not None and item.logprobs.top[0][0] == item.token for item in items)
        assert all(item.logprobs is not None and len(item.logprobs.top) == 2 for item in items)

    run(test)


def test_cancelling_stops_the_work_and_ends_the_messages(run: Run, server: Cluster) -> None:
    async def test(rig: Rig) -> None:
        rig.recorder.items.clear()
        rig.client.submit(submission(greedy(3000)))
        await rig.until(lambda: len(rig.recorder.items) > 3)
        rig.client.cancel(RequestId("unknown"), 0)
        rig.client.cancel(RequestId("r"), 1)
        rig.client.cancel(RequestId("r"), 0)
        await rig.rest()
        await asyncio.to_thread(server.wait_idle)
        seen = len(rig.recorder.items)
        await asyncio.sleep(10 * STEP_S)
        assert len(rig.recorder.items) == seen < 3000 and not rig.recorder.failures

    run(test)


def test_what_the_engine_refuses_is_a_failure_that_is_not_tried_again(run: Run) -> None:
    async def test(rig: Rig) -> None:
        rig.client.submit(submission(greedy(10_000_000)))
        await rig.until(lambda: rig.recorder.failures)
        failure = rig.recorder.failures[0]
        assert (failure.request, failure.attempt, failure.retryable) == ("r", 0, False) and failure.message

    run(test)


def test_submitting_and_cancelling_never_wait(run: Run, server: Cluster) -> None:
    async def test(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        for first in (0, 50, 100):  # the machine may take its time once; who waits does so each time
            started = loop.time()
            for attempt in range(first, first + 50):
                rig.client.submit(submission(greedy(100), attempt=attempt))
            for attempt in range(first, first + 50):
                rig.client.cancel(RequestId("r"), attempt)
            took = loop.time() - started
            await rig.rest()
            await asyncio.to_thread(server.wait_idle)
            if took < 0.5:
                break
        assert took < 0.5

    run(test)


def test_a_native_worker_that_is_killed_is_lost_with_its_requests() -> None:
    async def inside() -> None:
        async with _router(QUICK) as (recorder, _, address):
            with contextlib.ExitStack() as stack:
                rig = Rig(recorder, await _native(stack, address, FLAGS))
                await _joined(recorder)
                rig.kill()
                await rig.until(lambda: recorder.gone == ["native-0"])

    asyncio.run(asyncio.wait_for(inside(), 60))


def test_an_attached_server_that_is_killed_fails_its_requests_at_once_and_is_lost(flags: tuple[str, ...]) -> None:
    async def inside(cluster: Cluster) -> None:
        async with _router(QUICK) as (recorder, membership, _):
            keeping = _attach(membership, cluster.url, QUICK)
            rig = Rig(recorder, cluster.process.kill)
            await _joined(recorder)
            rig.client.submit(submission(greedy(3000)))
            await rig.until(lambda: len(recorder.items) > 3)
            rig.kill()
            await rig.until(lambda: recorder.failures)
            assert recorder.gone == [], "at once, and not when heartbeats are missed"
            assert recorder.failures[0].retryable
            assert not recorder.view.snapshot(0.0).placeable[0]
            await rig.until(lambda: recorder.gone == ["attached-0"])
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    died = pytest.raises(AssertionError, match=f"exit code -{signal.SIGKILL.value}")
    with died, serve("smollm2", *flags, "--policy", "single") as cluster:
        asyncio.run(asyncio.wait_for(inside(cluster), 60))
