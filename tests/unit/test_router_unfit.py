"""Requests that an attached server could never take, whatever its state: they go elsewhere or back, and harm nobody."""

from __future__ import annotations

import pytest
from tests.unit.test_router_attached_service import server
from tests.unit.test_router_service import Bench, RecordingClient, item, scenario, settle

from bascule.errors import InvalidRequest, Unavailable
from bascule.kv.hashing import salt_of
from bascule.types import Epoch, FinishReason, RequestId, Role, WorkerId
from bascule.wire import Failed

ANN = salt_of("ann")
POLICIES = pytest.mark.parametrize("policy", ["adaptive", "replicated", "disaggregated", "thresholds", "round-robin"])


class Servers(Bench):
    """Attached servers, and no worker of our own so far; by name, and whether they keep tenants apart."""

    def __init__(self, policy: str = "replicated", **servers: bool) -> None:
        super().__init__({"own": Role.MIXED}, policy=policy)
        self.lose("own")
        self.service.view.weights.card = None
        for name, keeps_apart in servers.items():
            self.clients[name] = RecordingClient()
            offered = server(name, keeps_apart=keeps_apart)
            self.service.joined(self.service.view.add(offered, 0.0, attached=True), self.clients[name])

    def asked(self, name: str) -> list[str]:
        return [submission.request for submission in self.clients[name].submitted]

    def cannot(self, name: str, request: str = "r") -> None:
        """The server shows, by its answer, that it does not know a parameter of the request."""
        self.service.failed(
            Failed(
                worker=WorkerId(name),
                epoch=Epoch(f"{name}-1"),
                request=RequestId(request),
                attempt=0,
                message=f"server {name} names tokens by their text; leave logprobs out",
                retryable=True,
                unfit="logprobs",
            )
        )

    def unblamed(self, name: str) -> bool:
        """Whether nothing is held against the server, and no try was taken from the budget of all."""
        member = self.service.view.members[WorkerId(name)]
        spent = self.service.retries.counts["failed"] + self.service.retries.counts["refused"]
        return not (member.strikes or member.resting or self.service.retries.rests or spent)


@POLICIES
def test_requests_with_a_salt_go_only_where_they_are_kept_apart(policy: str) -> None:
    @scenario
    async def test() -> None:
        bench = Servers(policy, careless=False, careful=True)
        tasks = [bench.start(f"salted {index}", salt=ANN) for index in range(4)]
        await settle()
        assert bench.asked("careful") and not bench.asked("careless")
        for task in tasks:
            task.cancel()

    test()


@POLICIES
def test_a_request_with_a_salt_that_none_keeps_apart_is_refused_at_once_and_others_go_on(policy: str) -> None:
    @scenario
    async def test() -> None:
        bench = Servers(policy, careless=False)
        for index in range(5):
            with pytest.raises(InvalidRequest, match="send no cache_salt") as caught:
                await bench.start(f"salted {index}", salt=ANN)
            assert caught.value.param == "cache_salt"
        plain = bench.start("plain")
        await settle()
        assert bench.asked("careless") == ["plain"] and bench.unblamed("careless")
        plain.cancel()

    test()


@scenario
async def test_it_is_refused_at_once_though_others_wait_before_it() -> None:
    bench = Servers(careless=False)
    tasks = [bench.start(f"plain {index}") for index in range(6)]
    await settle()
    assert len(bench.asked("careless")) < len(tasks), "some wait"
    with pytest.raises(InvalidRequest):
        await bench.start("salted", salt=ANN)
    for task in tasks:
        task.cancel()


@scenario
async def test_where_workers_of_our_own_are_away_it_may_be_sent_again() -> None:
    bench = Servers(careless=False)
    bench.join("own", Role.MIXED, "own-2")
    salted = bench.start(salt=ANN)
    await settle()
    assert bench.asked("own") == ["r"]
    bench.lose("own")
    bench.service.tick()
    with pytest.raises(Unavailable, match="when workers are back"):
        await salted


@POLICIES
def test_what_a_server_shows_it_cannot_do_is_asked_of_another_and_not_held_against_it(policy: str) -> None:
    @scenario
    async def test() -> None:
        bench = Servers(policy, one=True, other=True)
        starting = bench.start()
        await settle()
        first, second = ("one", "other") if bench.asked("one") else ("other", "one")
        bench.cannot(first)
        assert bench.asked(first) == bench.asked(second) == ["r"]
        assert bench.unblamed(first)
        bench.tokens(second, item(0, 7, attempt=1, finish=FinishReason.LENGTH))
        await starting

    test()


@scenario
async def test_what_the_only_server_cannot_do_is_refused_at_its_first_answer() -> None:
    bench = Servers(one=True)
    for index in range(5):
        starting = bench.start(f"r{index}")
        await settle()
        bench.cannot("one", f"r{index}")
        with pytest.raises(InvalidRequest, match="leave logprobs out") as caught:
            await starting
        assert caught.value.param == "logprobs"
    assert len(bench.asked("one")) == 5 and bench.unblamed("one")
