"""A live worker's name is its own: a second process with it waits or is refused, and ousts only who is silent."""

from __future__ import annotations

import logging

import pytest
from membership_rig import Bench, offer
from msgspec.structs import replace

from bascule.router.claims import PATIENCE_S
from bascule.router.silence import SILENT_S
from bascule.types import Epoch, WorkerId, WorkerLoad
from bascule.wire import Goodbye, Heartbeat, Leaving, Registered, RegistrationRefusal

A = WorkerId("a")
BEAT_S = 0.5


class Rival:
    """Worker `a-1` is a member; others come with its name."""

    def __init__(self) -> None:
        self.bench = Bench("a")
        self.bench.link.sent.clear()

    def comes(self, epoch: str = "a-2", pid: int = 2) -> None:
        self.bench.hear(replace(offer("a", epoch), pid=pid))

    def beats(self, epoch: str = "a-1") -> None:
        self.bench.hear(Heartbeat(A, Epoch(epoch), WorkerLoad()))

    def passes(self, seconds: float) -> None:
        """As the router's watch has it, where nobody speaks."""
        self.bench.clock.advance(seconds)
        self.bench.membership.claims.tick(self.bench.view.members)

    @property
    def member(self) -> Epoch:
        return self.bench.view.members[A].epoch

    def answers(self, epoch: str) -> list[object]:
        said = [one for to, one in self.bench.link.sent if to == epoch]
        return [one for one in said if isinstance(one, Registered | RegistrationRefusal)]


def test_a_second_process_does_not_oust_the_first_and_is_refused_with_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rival = Rival()
    rival.passes(60.0)
    rival.beats()
    for _ in range(int(PATIENCE_S)):
        rival.comes(pid=77)
        assert rival.answers("a-2") == []
        for _ in range(2):
            rival.passes(BEAT_S)
            rival.beats()
    with caplog.at_level(logging.ERROR):
        rival.comes(pid=77)
    [refusal] = rival.answers("a-2")
    assert isinstance(refusal, RegistrationRefusal)
    assert refusal.reason == (
        "another live worker has the name a: process 1 on the same machine, at tcp://127.0.0.1:1, for 64 s; start this "
        "one (process 77) with another --id, or end that one first"
    )
    assert refusal.reason in caplog.text
    assert rival.member == "a-1" and rival.bench.view.burned == set()


def test_a_worker_killed_and_started_again_has_its_name_once_the_old_one_is_silent() -> None:
    rival = Rival()
    rival.passes(0.3)
    rival.comes()
    assert rival.member == "a-1"
    rival.passes(SILENT_S - 0.4)
    assert rival.member == "a-1" and rival.answers("a-2") == []
    rival.passes(0.2)
    assert rival.member == "a-2"
    [taken] = rival.answers("a-2")
    assert isinstance(taken, Registered)
    assert rival.bench.view.burned == {"a-1"}


def test_who_comes_when_the_old_one_is_silent_already_does_not_wait() -> None:
    rival = Rival()
    rival.passes(SILENT_S + 0.1)
    rival.comes()
    assert rival.member == "a-2"


@pytest.mark.parametrize("how", ["the launcher says so", "it says goodbye"])
def test_a_worker_whose_end_is_known_leaves_its_name_at_once(how: str) -> None:
    rival = Rival()
    rival.comes("a-2")
    if how == "it says goodbye":
        rival.bench.hear(Goodbye(A, Epoch("a-1")))
    else:
        rival.bench.membership.lost(A, "has ended")
    rival.passes(0.0)
    assert rival.member == "a-2", "who waits need not ask again"
    rival.bench.membership.lost(A, "has ended")
    rival.comes("a-3")
    assert rival.member == "a-3"


def test_a_paused_worker_is_replaced_and_its_voice_is_stale_when_it_wakes() -> None:
    rival = Rival()
    rival.comes()
    rival.passes(SILENT_S + 0.1)
    assert rival.member == "a-2"
    rival.beats("a-1")
    [told] = rival.answers("a-1")
    assert isinstance(told, RegistrationRefusal) and "was declared dead" in told.reason
    rival.comes("a-1")
    assert "has ended; restart the worker" in rival.answers("a-1")[1].reason  # type: ignore[attr-defined]
    assert rival.member == "a-2"


def test_of_two_that_wait_one_is_taken_and_does_not_lose_the_name_to_the_other() -> None:
    rival = Rival()
    rival.comes("a-2")
    rival.comes("a-3")
    for _ in range(2):
        rival.passes(SILENT_S / 2 + 0.1)
    assert rival.member == "a-2"
    for _ in range(12):
        rival.passes(BEAT_S)
        rival.beats("a-2")
        rival.comes("a-3")
    assert rival.member == "a-2"
    assert isinstance(rival.answers("a-3")[0], RegistrationRefusal)


def test_the_successor_of_a_worker_that_drains_waits_for_it_however_long_that_takes() -> None:
    rival = Rival()
    for _ in range(60):
        rival.bench.hear(Leaving(A, Epoch("a-1")))
        rival.beats()
        rival.comes()
        rival.passes(BEAT_S)
    assert rival.member == "a-1" and rival.answers("a-2") == []
    rival.bench.hear(Goodbye(A, Epoch("a-1")))
    rival.passes(0.1)
    assert rival.member == "a-2"


def test_one_that_has_given_up_waiting_is_not_taken_in() -> None:
    rival = Rival()
    rival.comes()
    for _ in range(6):
        rival.passes(BEAT_S)
        rival.beats()
    rival.passes(SILENT_S + 0.1)
    assert rival.member == "a-1", "nobody is there to take the name"


def test_the_holder_may_repeat_its_own_registration() -> None:
    rival = Rival()
    rival.comes("a-1")
    [again] = rival.answers("a-1")
    assert isinstance(again, Registered) and rival.member == "a-1"
