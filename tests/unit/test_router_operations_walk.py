"""Whatever operators and leaving workers do, and in whatever order: who drains gets nothing, and no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_operations import LAST, Rig
from test_router_service import collect, item, settle

from bascule.errors import Conflict
from bascule.router.flight import Flight
from bascule.types import Role, WorkerId
from bascule.wire import Submit

ROLES = {"a": Role.PREFILL, "b": Role.DECODE, "c": Role.DECODE, "d": Role.MIXED}
OUTPUT = [0, 1, 2]


class Walk(Rig):
    """A rig that takes any step, and notes each submission that names a draining worker."""

    def __init__(self, policy: str) -> None:
        self.wrong: list[Submit] = []
        self.starts = 0
        self.tasks: list[asyncio.Task[Flight]] = []
        super().__init__(ROLES, policy=policy)

    def join(self, name: str, role: Role, epoch: str = "", *, attached: bool = False) -> None:
        super().join(name, role, epoch, attached=attached)
        client = self.clients[name]
        submit = client.submit

        def watched(submission: Submit) -> None:
            named = [name]
            named += [submission.decode.worker] if submission.decode is not None else []
            named += [submission.fetch.peer.worker] if submission.fetch is not None else []
            if any(self.service.view.members[WorkerId(one)].draining for one in named):
                self.wrong.append(submission)
            submit(submission)

        client.submit = watched  # type: ignore[method-assign]

    async def step(self, what: str, value: Any) -> None:
        if what == "start":
            self.starts += 1
            self.tasks.append(self.start(f"r{self.starts}", tokens=value, timeout=10_000))
            await settle()
        elif what == "token":
            flights = list(self.service._flights.values())
            self.token(flights[value % len(flights)]) if flights else None
        elif what == "tick":
            self.tick(value)
        elif what in ("drain", "drain soon"):
            self.drain(value, 1.0 if what == "drain soon" else None)
        elif what == "leave":
            self.leaves(value)
            self.restart(value)
        elif what == "restart":
            self.restart(value)
        else:
            with contextlib.suppress(Conflict):
                self.resume(value) if what == "resume" else self.operations.set_role(value, Role(what))
        assert not self.wrong

    def token(self, flight: Flight) -> None:
        """The next token of a request that is placed."""
        if flight.placed is not None:
            position = len(flight.tokens)
            worker = flight.placed.prefill if flight.prefilling else flight.placed.decode
            finish = LAST if position == OUTPUT[-1] else None
            self.tokens(worker, item(position, position, flight.attempt, flight.request.id, finish))

    def restart(self, name: str) -> None:
        """A worker that was told to stop is started anew, which no request may notice."""
        if self.stops(name):
            self.starts += 1
            attempts = {flight: flight.attempt for flight in self.service._flights.values()}
            self.lose(name)
            assert attempts == {flight: flight.attempt for flight in self.service._flights.values()}
            self.join(name, ROLES[name], f"{name}-new{self.starts}")

    async def finish(self) -> None:
        """Resume all, and let all requests end; every one must have its output, and nothing be left."""
        for name in ROLES:
            await self.step("resume", name)
        while self.service.active:
            for flight in list(self.service._flights.values()):
                self.token(flight)
            await self.step("tick", 0.1)
            for name in ROLES:
                self.restart(name)
        for task in self.tasks:
            assert await collect(await task) == OUTPUT
        for name in ROLES:
            self.drain(name)
            assert self.state(name) == "drained"
        snapshot = self.service.view.snapshot(self.clock.now())
        assert not snapshot.placeable.any() and not snapshot.decoding.any() and not snapshot.prefilling.any()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 300)),
        st.tuples(st.just("token"), st.integers(0, 50)),
        st.tuples(st.sampled_from(["drain", "drain soon", "resume", "leave", "restart"]), st.sampled_from([*ROLES])),
        st.tuples(st.sampled_from([*Role]), st.sampled_from([*ROLES])),
        st.tuples(st.just("tick"), st.floats(0.0, 2.0)),
    ),
    max_size=50,
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.sampled_from(["disaggregated", "replicated", "adaptive", "thresholds", "random"]))
def test_a_draining_worker_gets_nothing_and_every_request_ends_with_its_tokens(
    steps: list[tuple[str, Any]], policy: str
) -> None:
    async def follow() -> None:
        walk = Walk(policy)
        for what, value in steps:
            await walk.step(what, value)
        await walk.finish()

    asyncio.run(asyncio.wait_for(follow(), 30))
