"""A whole handoff between both sides over every transport: checked chunk by chunk, and never believed unchecked."""

from __future__ import annotations

import asyncio
import math

import pytest
from engine_rig import BLOCK, reference
from handoff_rig import KEY, OWN_PRIORITY, OWN_SLO, PROMPT, SAMPLING, SOURCE, Pair, pair, verdicts

from bascule.engine.core import Work
from bascule.kv.books import Lease
from bascule.peer_wire import Commit, PeerMessage, Written
from bascule.types import Slo, TicketId

EVERY = pytest.mark.parametrize("transport", ["loopback", "shm", "tcp", "sealed"])


def test_what_a_request_asks_for_itself_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Slo | None, int]] = []
    with pair("loopback") as both:
        adopt = both.target.adopt

        def watch(work: Work, lease: Lease) -> None:
            asked.append((work.slo, work.priority))
            adopt(work, lease)

        monkeypatch.setattr(both.target, "adopt", watch)
        both.loop.run_until_complete(both.run())
    assert asked == [(OWN_SLO, OWN_PRIORITY)]


@EVERY
def test_each_chunk_is_announced_and_checked_before_the_commit(transport: str) -> None:
    checked: list[int] = []

    def watch(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Commit):
            checked.append(len(both.decode._tickets[message.ticket].found))
        return message

    with pair(transport, watch) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["accepted"]
        announced = [message.blocks for message in both.sent(Written) if isinstance(message, Written)]
        held = -(-len(PROMPT) // BLOCK)
        assert announced == sorted(announced) and announced[-1] == held
        assert len(announced) > 1, "a prompt of several chunks is announced in several parts"
        assert 0 < checked[0] < held, "the commit leaves the last chunk only"
        [link] = both.prefill.links.costs().values()
        assert 0 < link.latency_s < math.inf and 0 < link.bytes_per_s < math.inf


@EVERY
@pytest.mark.parametrize("moment", [Written, Commit])
def test_a_byte_that_changed_on_the_way_is_refused_and_the_blocks_are_sent_again(transport: str, moment: type) -> None:
    """Where a byte changes before its chunk is announced, or (announcements lost) before the commit."""
    spoiled: list[int] = []

    def spoil(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, moment) and not spoiled:
            spoiled.append(both.first_block())
            both.target_arena.bytes[-1, spoiled[0], -1] ^= 1
        return None if moment is Commit and isinstance(message, Written) else message

    with pair(transport, spoil) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert spoiled and verdicts(both) == ["checksum", "accepted"]
        assert both.decode.refused["checksum"] == 1


@EVERY
def test_lost_announcements_cost_nothing_but_time(transport: str) -> None:
    with pair(transport, lambda both, message: None if isinstance(message, Written) else message) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["accepted"]


@EVERY
def test_announcing_what_is_not_there_yet_is_refused_at_the_commit(transport: str) -> None:
    """Checked too early, the blocks are not those of the manifest, whatever lies there later."""
    lied: list[TicketId] = []

    def lie(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if isinstance(message, Written) and (not lied or lied[0] == message.ticket):
            lied.append(message.ticket)
            return Written(message.ticket, 10_000)
        return message

    with pair(transport, lie) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING)
        assert verdicts(both) == ["checksum", "accepted"]


def test_announcements_of_unknown_and_ended_tickets_are_ignored() -> None:
    with pair("loopback") as both:
        both.decode.apply(SOURCE.epoch, Written(TicketId("nobody's"), 3))
        both.loop.run_until_complete(both.run())
        commit = both.sent(Commit)[-1]
        assert isinstance(commit, Commit)
        both.decode.apply(SOURCE.epoch, Written(commit.ticket, 3))
        assert verdicts(both) == ["accepted"]


def test_a_cancel_in_the_same_turn_as_the_commit_ends_the_handoff_quietly() -> None:
    checks: list[asyncio.Task[None]] = []

    def cancel_at_once(both: Pair, message: PeerMessage) -> PeerMessage | None:
        if not isinstance(message, Commit):
            return message
        both.decode.apply(SOURCE.epoch, message)
        checks.extend(both.decode._checks)
        both.decode.cancel(KEY)
        return None

    with pair("loopback", cancel_at_once) as both:
        assert both.loop.run_until_complete(both.run()) == reference(PROMPT, SAMPLING), "it decodes where it is"
        assert verdicts(both) == ["cancelled"]
        assert checks and all(check.exception() is None for check in checks)
