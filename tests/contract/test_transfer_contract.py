"""What every transport must keep: exact bytes, only where and only as long as they are granted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from threading import Event

import msgspec
import numpy as np
import pytest
from transfer_link import (
    ALL,
    BLOCKS,
    LAYOUT,
    OTHER,
    SECRET,
    TICKET,
    WRONG,
    Link,
    PushingThread,
    make_link,
    moves,
    wait_until,
)

from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Move, Pushed, TransferError


@pytest.fixture(params=["loopback", "shm", "tcp", "sealed"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    with ExitStack() as stack:
        yield make_link(request.param, stack)


# ---------------------------------------------------------------- all transports


@pytest.mark.parametrize("seed", range(4))
def test_bytes_arrive_exactly_and_nothing_else_changes(link: Link, seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([1, 2, 17, BLOCKS])
    pairs = dict(zip(draw.sample(range(BLOCKS), count), draw.sample(range(BLOCKS), count), strict=True))
    if seed % 2:
        first = draw.randrange(BLOCKS - 8)
        pairs = {first + i: BLOCKS - 8 + i for i in range(8)}
    sender, source = link.sender()
    link.arena.bytes[:] = 3
    link.grant(*pairs.values())
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    assert session.push(moves(pairs)) == Pushed(len(pairs) * LAYOUT.block_bytes)
    session.flush()
    expected = np.full_like(link.arena.bytes, 3)
    for origin, target in pairs.items():
        expected[:, target] = source.bytes[:, origin]
    assert np.array_equal(link.arena.bytes, expected)
    session.close()
    link.receiver.finish(TICKET)


def test_chunks_pushed_one_after_the_other_all_lie_there_after_one_flush(link: Link) -> None:
    sender, source = link.sender()
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    for move in ALL:
        session.push([move])
    session.flush()
    assert np.array_equal(link.arena.bytes, source.bytes)


def test_a_wrong_secret_and_an_unknown_ticket_are_refused(link: Link) -> None:
    sender, _ = link.sender()
    link.grant()
    with pytest.raises(TransferError, match=r"wrong secret|sealed with other keys"):
        sender.open(link.receiver.endpoint, TICKET, WRONG)
    with pytest.raises(TransferError, match="unknown"):
        sender.open(link.receiver.endpoint, OTHER, SECRET)
    assert sum(link.receiver.refusals.values()) == 2
    assert not link.arena.bytes.any()


def test_a_sender_with_another_layout_is_refused(link: Link) -> None:
    other = msgspec.structs.replace(LAYOUT, dtype="bfloat16")
    link.grant()
    arena = link.stack.enter_context(Arena.create(other, BLOCKS))
    sender = link.stack.enter_context(closing(link.new_sender(arena)))
    with pytest.raises(TransferError, match="layout"):
        sender.open(link.receiver.endpoint, TICKET, SECRET)


def test_blocks_outside_the_grant_are_not_written(link: Link) -> None:
    sender, _ = link.sender()
    link.grant(4, 5, 6)
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    with pytest.raises(TransferError):
        session.push(moves({5: 5, 6: 6, 7: 7}))
        session.flush()
    outside = np.delete(link.arena.bytes, [4, 5, 6], axis=1)
    assert not outside.any()


def test_a_grant_outside_the_arena_or_given_twice_is_an_error(link: Link) -> None:
    with pytest.raises(ValueError, match="outside"):
        link.grant(BLOCKS)
    link.grant(1)
    with pytest.raises(ValueError, match="already"):
        link.grant(2)


def test_a_ticket_that_nobody_announced_is_revoked_for_good(link: Link) -> None:
    sender, _ = link.sender()
    link.grant()
    assert link.receiver.revoke(TICKET)
    assert link.receiver.revoke(TICKET)
    with pytest.raises(TransferError, match="unknown"):
        sender.open(link.receiver.endpoint, TICKET, SECRET)
    assert link.safe == []


def test_a_flush_after_revocation_fails(link: Link) -> None:
    sender, _ = link.sender()
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    session.push(ALL)
    link.receiver.revoke(TICKET)
    with pytest.raises(TransferError):
        session.flush()


def test_a_closed_session_refuses_to_push(link: Link) -> None:
    sender, _ = link.sender()
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    session.close()
    session.close()
    for use in (lambda: session.push(ALL), session.flush):
        with pytest.raises(TransferError, match="closed"):
            use()


def test_a_closed_session_ends_a_push_under_way_in_another_thread(link: Link) -> None:
    sender, _ = link.sender(fill=7)
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    pushing = PushingThread(lambda: session.push(ALL))
    wait_until(lambda: link.arena.bytes[0, 0, 0] == 7, "the first bytes")
    session.close()
    pushing.join()
    assert isinstance(pushing.error, TransferError)


def test_two_senders_at_once_do_not_mix(link: Link) -> None:
    half = BLOCKS // 2
    sessions = []
    for ticket, fill, first in ((TICKET, 1, 0), (OTHER, 2, half)):
        sender, _ = link.sender(fill=fill)
        link.grant(*range(first, first + half), ticket=ticket)
        session = sender.open(link.receiver.endpoint, ticket, SECRET)
        sessions.append((session, [Move(block, block) for block in range(first, first + half)]))
    stop = Event()
    threads = [PushingThread(lambda s=s, m=m: s.push(m), stop) for s, m in sessions]
    wait_until(lambda: link.arena.bytes[-1, half - 1, -1] and link.arena.bytes[-1, -1, -1], "both")
    stop.set()
    for thread, (session, _) in zip(threads, sessions, strict=True):
        thread.join()
        assert thread.error is None
        session.flush()
    assert (link.arena.bytes[:, :half] == 1).all()
    assert (link.arena.bytes[:, half:] == 2).all()


def test_a_closed_receiver_is_reported(link: Link) -> None:
    sender, _ = link.sender()
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    endpoint = link.receiver.endpoint
    link.receiver.close()
    link.receiver.close()
    with pytest.raises(TransferError):
        session.push(ALL)
        session.flush()
    with pytest.raises(TransferError):
        sender.open(endpoint, TICKET, SECRET)


# ---------------------------------------------------------------- where revocation is at once


@pytest.mark.parametrize("link", ["loopback", "tcp", "sealed"], indirect=True)
def test_memory_reused_after_a_revocation_in_mid_push_is_untouched(link: Link) -> None:
    sender, _ = link.sender(fill=7)
    link.grant()
    session = sender.open(link.receiver.endpoint, TICKET, SECRET)
    pushing = PushingThread(lambda: session.push(ALL))
    wait_until(lambda: link.arena.bytes[0, 0, 0] == 7, "the first bytes")
    assert link.receiver.revoke(TICKET)
    link.arena.bytes[:] = 9
    pushing.join()
    assert isinstance(pushing.error, TransferError)
    assert (link.arena.bytes == 9).all()
