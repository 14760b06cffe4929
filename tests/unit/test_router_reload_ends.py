"""How a reload ends: who is waited for, who stands for whom, and what ends it early."""

from __future__ import annotations

import pytest
from membership_rig import CARD
from test_router_reload import NEW, Rig
from test_router_service import scenario

from bascule.errors import Conflict
from bascule.types import WorkerId
from bascule.wire import RegistrationRefusal, Stop


@scenario
async def test_a_worker_that_does_not_come_back_ends_the_reload_and_the_others_serve_on() -> None:
    rig = Rig("a", "b", "c")
    rig.operations.reload(timeout=30.0)
    with pytest.raises(Conflict, match="already"):
        rig.operations.reload()
    rig.tick()
    rig.ends("a")
    rig.tick()
    rig.tick(29)
    assert rig.operations.reload_status().state == "running"
    rig.tick(2)
    status = rig.operations.reload_status()
    assert status.state == "failed" and "a has ended and not come back in 30 s" in status.failure
    assert rig.states() == {"b": "ready", "c": "ready"}
    rig.come("a", NEW)
    assert rig.told("a", RegistrationRefusal), "b and c have the weights of before"
    rig.epochs["a"] = "a-3"
    rig.come("a")
    assert rig.operations.reload().workers == 3


@scenario
async def test_a_worker_that_was_down_before_stands_for_nobody_else_when_it_comes_back() -> None:
    rig = Rig("a", "b")
    rig.membership.lost(WorkerId("a"), "died")
    rig.epochs["a"] = "a-2"
    rig.operations.reload()
    rig.tick()
    rig.ends("b")
    rig.come("a")
    rig.tick()
    status = rig.operations.reload_status()
    assert (status.state, status.workers, status.done) == ("running", 1, 0), "b is not back"
    rig.come("b")
    rig.tick()
    assert rig.operations.reload_status().state == "done" and rig.operations.reload_status().done == 1


@scenario
async def test_files_that_change_while_a_reload_runs_are_served_in_the_end() -> None:
    rig = Rig("a", "b")
    rig.operations.reload(timeout=30.0)
    rig.tick()
    rig.ends("a")
    rig.tick()
    rig.come("a", NEW)
    rig.tick()
    rig.come("a", NEW)
    assert rig.view.card == NEW and rig.states()["b"] == "drained"
    rig.ends("b")
    rig.tick()
    rig.come("b")  # the files of before were put back
    rig.tick()
    assert rig.states() == {"a": "drained"}, "it has weights that nobody shall have any more"
    rig.come("b")
    assert rig.view.card == CARD
    rig.ends("a")
    rig.tick(25)
    rig.come("a")
    rig.tick()
    status = rig.operations.reload_status()
    assert (status.state, status.workers, status.done) == ("done", 2, 2) and not rig.view.weights.reloading
    assert rig.states() == {"a": "ready", "b": "ready"}


@scenario
async def test_workers_whose_files_differ_for_good_do_not_take_turns_for_ever() -> None:
    rig = Rig("a", "b")
    files = {"a": CARD, "b": NEW}
    rig.operations.reload()
    for _ in range(40):
        rig.tick()
        for name, card in files.items():
            if rig.told(name, Stop):
                rig.ends(name)
            if WorkerId(name) not in rig.view.members:
                rig.come(name, card)
    status = rig.operations.reload_status()
    assert status.state == "failed" and "other weights than those that are served" in status.failure
    assert len(rig.states()) == 1


@scenario
async def test_where_no_worker_is_left_a_reload_takes_those_that_come() -> None:
    rig = Rig("a")
    rig.membership.lost(WorkerId("a"), "died")
    rig.epochs["a"] = "a-2"
    rig.come("a", NEW)
    assert rig.told("a", RegistrationRefusal)
    rig.epochs["a"] = "a-3"
    assert rig.operations.reload(timeout=30.0).state == "running"
    rig.tick(20)
    rig.come("a", NEW)
    rig.tick()
    assert rig.operations.reload_status().state == "done" and rig.view.card == NEW
    rig.membership.lost(WorkerId("a"), "died")
    rig.operations.reload(timeout=30.0)
    rig.tick()
    rig.tick(31)
    assert "no worker has come back in 30 s" in rig.operations.reload_status().failure


@scenario
async def test_workers_may_come_back_under_new_names() -> None:
    rig = Rig("pod-1", "pod-2")
    rig.operations.reload()
    for old, new in (("pod-1", "pod-3"), ("pod-2", "pod-4")):
        rig.tick()
        rig.ends(old)
        rig.tick()
        assert rig.operations.reload_status().state == "running"
        rig.come(new)
        rig.tick()
    assert rig.operations.reload_status().state == "done" and rig.operations.reload_status().done == 2


@scenario
async def test_a_worker_that_cannot_be_started_ends_the_reload_at_once_and_says_why() -> None:
    rig = Rig("a", "b")
    rig.operations.renewal.cannot_start(WorkerId("a"), "could not start")
    rig.operations.reload()
    rig.operations.renewal.cannot_start(WorkerId("b"), "could not start")
    rig.tick()
    assert rig.operations.reload_status().state == "running", "it is not b's turn"
    rig.ends("a")
    rig.operations.renewal.cannot_start(WorkerId("a"), "could not start; its message is above")
    status = rig.operations.reload_status()
    assert (status.state, status.done) == ("failed", 0) and "a could not start" in status.failure
    assert rig.states() == {"b": "ready"}


@scenario
async def test_a_waiting_worker_that_has_given_up_does_not_count_as_back() -> None:
    rig = Rig("a", "b")
    rig.operations.reload(timeout=30.0)
    rig.tick()
    rig.ends("a")
    rig.tick()
    rig.come("a", NEW)
    rig.clock.advance(3.0)
    rig.operations.tick()
    assert rig.operations.reload_status().waiting == () and rig.states() == {"b": "ready"}
    rig.come("a", NEW)
    rig.tick()
    assert rig.states() == {"b": "drained"}
