"""One handoff that leaves this worker, and what transfer threads do for it: take checksums, send."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from threading import Lock
from time import perf_counter

from msgspec import Struct

from bascule.engine.sequence import Key
from bascule.kv.arena import Arena
from bascule.kv.codecs.base import Codec
from bascule.kv.transfer.base import Move, Session
from bascule.peer_wire import Reserved
from bascule.types import BlockHash, TicketId
from bascule.wire import PeerAddress, Submit


class Outgoing:
    """One request on its way out: what is computed, and what the decode side has said of the current ticket."""

    def __init__(self, submission: Submit, decode: PeerAddress, block_size: int) -> None:
        self.submission = submission
        self.decode = decode
        self.key = Key(submission.request, submission.attempt)
        self.tokens = (*submission.prompt, *submission.generated)
        self.full_blocks = len(self.tokens) // block_size
        """Of the prompt."""
        self.prompt_blocks = -(-len(self.tokens) // block_size)
        """That hold the whole prompt."""
        self.hashes: tuple[BlockHash, ...] = ()
        """Of the prompt's full blocks."""
        self.blocks: tuple[int, ...] = ()
        """The sequence's block table."""
        self.computed = 0
        """Leading blocks that will not change any more: full ones, and with the first token the last one too."""
        self.checksums: dict[int, bytes] = {}
        """Of computed blocks as they lie here, by their place in the table."""
        self.coded: dict[int, bytes] = {}
        """Of blocks that a lossy codec changed on their way in this round: as they have to lie there."""
        self.digesting = Lock()
        self.first_token: int | None = None
        self.computed_at = 0.0
        """When the first token was there, by the loop's clock."""
        self.late_bytes = 0
        """KV pushed after that."""
        self.changed = asyncio.Event()
        self.round = 0
        self.ticket = TicketId("")
        self.reserved: asyncio.Future[Reserved] = asyncio.Future()
        self.verdict: asyncio.Future[None] = asyncio.Future()
        self.transport = ""
        self.pushing = False
        """A session is open, and each chunk's checksums are taken when it is sent."""
        self.task: asyncio.Task[None] | None = None

    def renew_ticket(self) -> None:
        """Start a new round; replies to the earlier ticket no longer count, nor what was sent under it."""
        self.round += 1
        self.late_bytes = 0
        self.coded = {}
        self.ticket = TicketId(uuid.uuid4().hex)
        self.reserved = asyncio.Future()
        self.verdict = asyncio.Future()

    def checksums_from(self, first: int) -> tuple[bytes, ...] | None:
        """Of what has to lie in the peer's arena, from block `first` on; None while any is missing."""
        known = self.checksums | self.coded
        places = range(first, self.computed)
        return tuple(known[place] for place in places) if all(place in known for place in places) else None


class Sent(Struct, frozen=True):
    """What a chunk took."""

    wire_bytes: int
    link_s: float
    """Seconds in which the link had something to send."""


class Endings:
    """What is done to its end, though who began it is cancelled meanwhile."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[None, None, None]) -> None:
        """Returns at the end of `work`, or when the caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Until all is done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Pusher:
    """What is done in threads, one at a time for each handoff but for early checksums."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def send(self, handoff: Outgoing, session: Session, moves: Sequence[Move], first: int, codec: Codec | None) -> Sent:
        """Send the prompt's blocks from `first` on; they lie in the peer's arena when this returns.

        Full blocks go through `codec`, if there is one. Then the checksums of those that it changed come from the
        session, and the others' are taken here.
        """
        if codec is None:
            self.digest(handoff)
        coded = handoff.coded  # of this round
        full = len(moves) if codec is None else max(0, handoff.full_blocks - first)
        begun = perf_counter()
        pushed = session.push(moves[:full], codec)
        wire_bytes = pushed.wire_bytes
        if moves[full:]:
            wire_bytes += session.push(moves[full:]).wire_bytes
        session.flush()
        link_s = perf_counter() - begun - pushed.idle_s
        coded.update((first + place, checksum) for place, checksum in pushed.coded.items())
        self.digest(handoff)
        return Sent(wire_bytes, link_s)

    def digest(self, handoff: Outgoing) -> None:
        """Take the checksums of what is computed and has none."""
        with handoff.digesting:
            ready, blocks = handoff.computed, handoff.blocks  # the table may grow meanwhile
            known = handoff.checksums.keys() | handoff.coded.keys()
            places = [place for place in range(ready) if place not in known]
            if not places:
                return
            size = self._arena.layout.block_size
            rest = len(handoff.tokens) % size
            in_last = rest if rest and places[-1] == handoff.full_blocks else size
            found = self._arena.checksums([blocks[place] for place in places], in_last)
            handoff.checksums.update(zip(places, found, strict=True))


def close_late(opening: Future[Session]) -> None:
    """Nobody waits any more for the session that is opened here."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
