"""A worker that the router cannot send to: requests go elsewhere, and do not use up their tries on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from membership_rig import Bench, FakeLink, offer

from bascule.policies.retry import MOST_TRIES
from bascule.types import Epoch, Request, RequestId, SamplingParams
from bascule.wire import RouterMessage, Submit


class BrokenLink(FakeLink):
    """Like the real one: what is for an epoch in `gone` is not sent, and that is told in the loop's next turn."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[str] = set()

    def send(self, epoch: Epoch, message: RouterMessage, on_failure: Callable[[], None] | None = None) -> None:
        if epoch not in self.gone:
            super().send(epoch, message)
        elif on_failure is not None:
            asyncio.get_running_loop().call_soon(on_failure)

    def submitted(self) -> list[tuple[str, str, int]]:
        """Worker, request and attempt of what has been sent since the last call."""
        sent = [(epoch, message) for epoch, message in self.sent if isinstance(message, Submit)]
        self.sent.clear()
        return [(epoch.split("-")[0], message.request, message.attempt) for epoch, message in sent]


def bench() -> tuple[Bench, BrokenLink]:
    made = Bench()
    made.membership._link = link = BrokenLink()  # type: ignore[assignment]
    for name in ("a", "b", "c"):
        made.hear(offer(name))
    return made, link


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def start(made: Bench, name: str) -> asyncio.Task[object]:
    request = Request(id=RequestId(name), prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=8), timeout=60.0)
    return asyncio.create_task(made.membership._service.start(request))


def test_only_the_first_request_tries_a_worker_that_is_not_connected() -> None:
    async def scenario() -> None:
        made, link = bench()
        link.gone = {"a-1", "b-1"}
        starting = [start(made, f"r{number}") for number in range(4)]
        await settle()
        sent = link.submitted()
        assert {worker for worker, _, _ in sent} == {"c"}
        assert sorted(request for _, request, _ in sent) == ["r0", "r1", "r2", "r3"]
        later = [start(made, f"later{number}") for number in range(3)]
        await settle()
        assert link.submitted() == []  # c has the four that it may have
        made.view.columns.slots[:] = 100
        made.membership._service.tick()
        await settle()
        assert [(worker, attempt) for worker, _, attempt in link.submitted()] == [("c", 0)] * 3
        for task in (*starting, *later):
            task.cancel()
        await asyncio.gather(*starting, *later, return_exceptions=True)

    asyncio.run(scenario())


def test_what_could_not_be_sent_has_all_its_tries_left_however_often_that_was() -> None:
    async def scenario() -> None:
        made, link = bench()
        link.gone = {"a-1", "b-1", "c-1"}
        first = start(made, "first")
        for _ in range(2 * MOST_TRIES):
            await settle()
            made.clock.advance(2.0)
            made.view.overdue(made.clock.now(), 1000.0, 2000.0)
            made.membership._service.tick()
        await settle()
        assert link.submitted() == [] and not first.done()
        link.gone = set()
        made.clock.advance(2.0)
        made.view.overdue(made.clock.now(), 1000.0, 2000.0)
        made.membership._service.tick()
        assert [request for _, request, _ in link.submitted()] == ["first"]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(scenario())


def test_it_gets_requests_again_a_moment_later() -> None:
    async def scenario() -> None:
        made, link = bench()
        link.gone = {"a-1", "b-1", "c-1"}
        first = start(made, "first")
        await settle()
        assert link.submitted() == []
        link.gone = set()
        made.clock.advance(2.0)
        made.view.overdue(made.clock.now(), 3.0, 10.0)
        second = start(made, "second")
        await settle()
        assert {request for _, request, _ in link.submitted()} == {"first", "second"}
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

    asyncio.run(scenario())
