"""Who joins is compared and reached first: versions, vocabularies, clocks, addresses; all are told of each other."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from membership_rig import CARD, Bench, FakeLink, offer
from msgspec.structs import replace

from bascule.config import RoutingConfig
from bascule.errors import RegistrationRefused
from bascule.link_wire import Reached, TryReach
from bascule.router import entrance as door
from bascule.router.entrance import Entrance
from bascule.router.pulse import HEARTBEAT_S
from bascule.router.skew import ClockSkew, skewed
from bascule.router.view import ClusterView
from bascule.types import Epoch, WorkerId, WorkerLoad
from bascule.wire import (
    VERSION,
    Goodbye,
    Heartbeat,
    Neighbour,
    Neighbours,
    OtherVersion,
    Probe,
    Probed,
    Registered,
    RegistrationRefusal,
    RouterMessage,
    encode,
    from_worker,
)


def nobody() -> str:
    """An address that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"127.0.0.1:{listening.getsockname()[1]}"


def at_the_door(
    config: RoutingConfig, script: Callable[[Entrance, FakeLink], Any], view: ClusterView | None = None
) -> FakeLink:
    """What is said to those whom `script` lets knock, once all of them have been answered."""

    async def run() -> FakeLink:
        link = FakeLink()
        entrance = Entrance(link, config, view or ClusterView())  # type: ignore[arg-type]
        script(entrance, link)
        while entrance._trying:
            await asyncio.sleep(0.01)
        return link

    return asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (RoutingConfig(), False),
        (RoutingConfig(check_reach=False), True),
        (RoutingConfig(handoff="store"), True),
    ],
)
def test_a_worker_out_of_reach_is_refused_unless_that_is_how_it_is_meant(
    config: RoutingConfig, taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[tuple[Epoch, bool]] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        good = offer("good")
        good = replace(good, peer=replace(good.peer, address=here))
        bad = replace(good, worker=WorkerId("bad"), kv_addresses=(where := nobody(),))

        def knock(entrance: Entrance, _: FakeLink) -> None:
            for one in (good, bad, bad):
                entrance.admit(Epoch(one.worker), one, lambda sender, _, reached: came.append((sender, reached)))

        link = at_the_door(config, knock)
    assert came == [("good", True), *([("bad", False)] if taken else [])]
    line = f"the router cannot connect to worker bad at {where} (connection refused): give it --host"
    if taken:
        assert link.sent == [] and [record.levelno for record in caplog.records] == [logging.WARNING]
    else:
        [(sender, refusal)] = link.sent
        assert sender == "bad" and isinstance(refusal, RegistrationRefusal) and "--no-check-reach" in refusal.reason
    assert line in caplog.text


def test_who_only_asks_is_told_which_workers_connect_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAR_S", 0.3)
    view, names, where = ClusterView(), ("good", "bad", "silent"), nobody()
    for name in names:
        view.add(offer(name), 0.0)
    view.add(offer("attached-0"), 0.0, attached=True)

    def knock(entrance: Entrance, link: FakeLink) -> None:
        def send(epoch: Epoch, message: RouterMessage, *_: object) -> None:
            link.sent.append((epoch, message))
            if isinstance(message, TryReach) and epoch != "silent-1":
                worker, other = (
                    WorkerId(epoch.removesuffix("-1")),
                    Reached(worker=WorkerId("attached-0"), epoch=Epoch("x"), question=message.question),
                )
                why = "" if worker == "good" else f"{message.addresses[0]} (no answer within 2 s)"
                answer = Reached(worker=worker, epoch=epoch, question=message.question, unreachable=why)
                stale = replace(answer, question="another", unreachable="stale")
                for one in (stale, other, answer, replace(answer, unreachable="said twice")):
                    entrance.heard(one)

        entrance._link.send = send  # type: ignore[method-assign]
        entrance.answer(Epoch("x"), Probe(VERSION, (where,)))

    link = at_the_door(RoutingConfig(), knock, view)
    assert [to for to, message in link.sent if isinstance(message, TryReach)] == [f"{name}-1" for name in names]
    [answer] = [message for _, message in link.sent if isinstance(message, Probed)]
    assert answer.from_workers == {"good": "", "bad": f"{where} (no answer within 2 s)"}


def test_who_only_asks_is_told_and_does_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAR_S", 0.1)
    where, view = nobody(), ClusterView(tokenizer="vocabulary")
    one, server = offer("one"), offer("attached-0")
    view.add(replace(one, card=replace(CARD, tokenizer="vocabulary"), kv_addresses=("127.0.0.1:2",)), 0.0)
    view.add(replace(server, card=replace(CARD, vocab=7)), 0.0, attached=True)
    ask = Probe(VERSION, (where,))
    link = at_the_door(RoutingConfig(), lambda entrance, _: entrance.answer(Epoch("x"), ask), view)
    [(asked, question), (_, answer)] = link.sent
    assert asked == "one-1" and isinstance(question, TryReach) and question.addresses == (where,)
    assert isinstance(answer, Probed)
    assert (answer.version, answer.tokenizer, answer.unreachable) == (
        VERSION,
        "vocabulary",
        f"{where} (connection refused)",
    )
    assert answer.card == view.weights.card and answer.attached_vocab == 7
    assert answer.members == (
        Neighbour(WorkerId("one"), (one.peer.address, "127.0.0.1:2")),
        Neighbour(WorkerId("attached-0"), ()),
    )
    bench = Bench()
    bench.membership.apply(Epoch("x"), Probe(VERSION))
    assert bench.view.members == {} and bench.link.sent == []


def test_a_registration_of_another_release_is_known_by_its_version_alone() -> None:
    theirs = {"type": "Register", "version": VERSION + 1, "worker": "w", "epoch": 5, "all": "else"}
    with pytest.raises(OtherVersion, match=rf"worker w speaks protocol version {VERSION + 1}, this router {VERSION};"):
        from_worker(msgspec.msgpack.encode(theirs))
    earlier = msgspec.msgpack.decode(encode(offer("w")))
    for late in ("release", "kv_addresses"):
        del earlier[late]
    assert from_worker(msgspec.msgpack.encode(earlier | {"version": 5})).version == 5  # type: ignore[union-attr]


def test_a_worker_with_another_vocabulary_than_the_routers_is_refused() -> None:
    view = ClusterView(tokenizer="ours")
    fits = offer("w")
    view.check(fits)
    view.check(replace(fits, card=replace(fits.card, tokenizer="ours")))
    with pytest.raises(RegistrationRefused, match="other text; start router and workers with the same model"):
        view.check(replace(fits, card=replace(fits.card, tokenizer="theirs")))


def test_workers_are_told_of_each_other_as_they_come_and_go() -> None:
    bench = Bench("a", "b")
    told = [(to, message) for to, message in bench.link.sent if isinstance(message, Neighbours)]
    assert [(to, [each.worker for each in message.come]) for to, message in told] == [
        ("a-1", []),
        ("b-1", ["a"]),
        ("a-1", ["b"]),
    ]
    assert told[1][1].come[0].addresses == ("tcp://127.0.0.1:1",)
    bench.link.sent.clear()
    bench.hear(Goodbye(WorkerId("b"), Epoch("b-1")))
    assert bench.link.sent == [("a-1", Neighbours(gone=(WorkerId("b"),)))]


def test_a_clock_is_judged_by_the_quickest_heartbeat_once_there_are_some() -> None:
    skew = ClockSkew()
    for delay in (9.0, 0.02, 3.0):
        skew.heard(100.0, 100.0 + delay)
        assert skew.seconds is None
    skew.heard(100.0, 100.5)
    assert skew.seconds == 0.02 and not skew.too_large
    assert "worker w is 3.0 s ahead of the router's" in skewed("worker w", -3.0)


def test_a_clock_that_is_off_and_a_peer_out_of_reach_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench("a")
    bench.membership._wall = lambda: 1000.0
    load = WorkerLoad(unreachable={WorkerId("b"): "tcp://10.0.0.9:1 (no answer within 2 s)"})
    for _ in range(8):
        bench.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), load, clock=990.0))
        bench.clock.advance(HEARTBEAT_S)
    [status] = bench.view.statuses()
    assert status.clock_skew_s == 10.0
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "worker a cannot connect to worker b at tcp://10.0.0.9:1" in warnings[0] and "10.0 s behind" in warnings[1]


def test_heartbeats_from_while_the_router_stood_still_are_no_measure_of_a_clock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench("a")
    bench.membership._wall = lambda: 1000.0 + bench.clock.now()

    def beat(late_s: float) -> None:
        sent = bench.membership._wall() - late_s
        bench.hear(Heartbeat(WorkerId("a"), Epoch("a-1"), WorkerLoad(), clock=sent))

    for _ in range(4):
        bench.clock.advance(HEARTBEAT_S)
        beat(0.01)
    bench.clock.advance(30.0)
    for number in range(60):
        beat(30.0 - number * HEARTBEAT_S)
    [status] = bench.view.statuses()
    assert status.clock_skew_s == 0.01 and "clock" not in caplog.text


def test_another_release_is_told_of_and_taken_in(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.hear(replace(offer("a"), release="0.0.1"))
    assert "worker a is of bascule 0.0.1" in caplog.text
    assert isinstance(bench.link.sent[0][1], Registered)
