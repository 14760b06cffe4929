"""What handing KV to another worker takes, measured when the router asks: blocks reserved there, pushed, and given up.

To the other worker it is a handoff that its prefill side gives up, so it reserves, grants and frees as ever, and no
block outlives the probe. What is pushed are the bytes of any blocks here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from bascule.engine.core import Engine
from bascule.kv.arena import Arena
from bascule.kv.transfer.base import SECRET_BYTES, Endpoint, Move, Sender, Session, TransferError
from bascule.kv.transfer.select import open_session
from bascule.link_wire import LinkMeasured, MeasureLink
from bascule.peer_wire import Abort, HandoffRefused, PeerMessage, Prepare, Reserved
from bascule.types import ModelCard, RequestId, SamplingParams, TicketId
from bascule.worker.outgoing import Endings, close_late
from bascule.worker.parts import Identity
from bascule.worker.peers import Peers

log = logging.getLogger(__name__)

BUDGET_S = 5.0
"""What a probe may take; what it has measured by then counts."""
_PAUSE_S = 0.02
"""Between two runs, in which streams on both workers go on."""
_LONGEST_S = 0.3
"""A push takes about so long at most: over a slow link it has fewer blocks."""


class _Refused(Exception):
    """The other worker does not take it, or cannot be reached."""


class LinkProbe:
    """One probe at a time. Runs in the asyncio loop; pushes in a thread of its own."""

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        arena: Arena,
        card: ModelCard,
        peers: Peers,
        senders: Mapping[str, Sender],
        send: Callable[[LinkMeasured], None],
    ) -> None:
        """`send` tells the router."""
        self._identity = identity
        self._engine = engine
        self._arena = arena
        self._card = card
        self._peers = peers
        self._senders = senders
        self._send = send
        self._task: asyncio.Task[None] | None = None
        self._answers: dict[TicketId, asyncio.Future[Reserved]] = {}
        self._endings = Endings()
        self._thread: ThreadPoolExecutor
        """Of the probe under way: one that hangs in a connection holds up no later one."""

    def measure(self, wish: MeasureLink) -> None:
        """Answers in any case; says that this worker is busy where it has prompts before it, or another probe."""
        if self._task is not None and not self._task.done():
            self._answer(wish, reason="another link is being measured from it", busy=True)
        elif (load := self._engine.load()).prefilling or load.waiting:
            self._answer(wish, reason=f"it has {load.prefilling + load.waiting} prompts to compute", busy=True)
        else:
            self._task = asyncio.create_task(self._run(wish))

    def apply(self, message: PeerMessage) -> bool:
        """The other worker's answer; False if it is not one to a probe."""
        if not isinstance(message, Reserved | HandoffRefused):
            return False
        answer = self._answers.get(message.ticket)
        if answer is None or answer.done():
            return answer is not None
        if isinstance(message, Reserved):
            answer.set_result(message)
        else:
            answer.set_exception(_Refused(message.reason))
        return True

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._endings.close()

    def _answer(self, wish: MeasureLink, **found: object) -> None:
        identity = self._identity
        self._send(LinkMeasured(worker=identity.worker, epoch=identity.epoch, probe=wish.probe, **found))  # type: ignore[arg-type]

    async def _run(self, wish: MeasureLink) -> None:
        runs: list[tuple[float, float, float]] = []
        reason, blocks = "", 1
        self._thread = ThreadPoolExecutor(1, "kv-probe")
        try:
            async with asyncio.timeout(BUDGET_S):
                await self._once(wish, 1)  # which also connects
                _, block_s, _ = await self._once(wish, 1)
                few = self._most_blocks(wish, block_s)
                _, block_s, push_s = await self._once(wish, few)
                # Over a link where most of the first was the way there and back, more go into the same time.
                blocks = max(few, self._most_blocks(wish, max(push_s - block_s, 0.0) / (few - 1))) if few > 1 else few
                while len(runs) < wish.runs:
                    await asyncio.sleep(_PAUSE_S)
                    runs.append(await self._once(wish, blocks))
        except TimeoutError:
            reason = "" if runs else f"{wish.target.worker} had no room within {BUDGET_S:g} s, or did not answer"
        except _Refused as refusal:
            reason = str(refusal)
        except Exception as error:
            log.exception("a link could not be measured")
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if reason:
            self._answer(wish, reason=reason)
            return
        names = ("reserve_s", "block_s", "push_s")
        self._answer(wish, blocks=blocks, **dict(zip(names, zip(*runs, strict=True), strict=True)))

    def _most_blocks(self, wish: MeasureLink, block_s: float) -> int:
        """Of one push, where one block takes so long."""
        in_context = (self._card.context - 2) // self._card.layout.block_size
        return max(1, min(wish.blocks, self._arena.num_blocks, in_context, int(_LONGEST_S / max(block_s, 1e-6))))

    async def _once(self, wish: MeasureLink, blocks: int) -> tuple[float, float, float]:
        """Seconds of a reservation, of pushing one block, and of pushing all. Nothing is written after `Abort`."""
        ticket, secret = TicketId(uuid.uuid4().hex), secrets.token_bytes(SECRET_BYTES)
        session: Session | None = None
        try:
            begun = time.perf_counter()
            reserved = await self._reserve(wish, ticket, secret, blocks)
            reserve_s = time.perf_counter() - begun
            session = await self._open(wish, reserved, ticket, secret)
            moves = [
                Move(source, target) for source, target in enumerate(reserved.blocks[reserved.have_blocks :][:blocks])
            ]
            pushing = asyncio.get_running_loop().run_in_executor(self._thread, self._push, session, moves)
            block_s, push_s = await pushing
        except TransferError as error:
            raise _Refused(f"{wish.transport}: {error}") from error
        finally:
            self._answers.pop(ticket, None)
            await self._endings.run(self._end(wish, ticket, session))
        return reserve_s, block_s, push_s

    async def _end(self, wish: MeasureLink, ticket: TicketId, session: Session | None) -> None:
        try:
            if session is not None:
                # A push under way in the thread ends with an error, and writes nothing after this.
                await asyncio.to_thread(session.close)
        finally:
            self._peers.send(wish.target, Abort(ticket))

    async def _reserve(self, wish: MeasureLink, ticket: TicketId, secret: bytes, blocks: int) -> Reserved:
        size, vocab = self._card.layout.block_size, self._card.vocab
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        self._peers.send(
            wish.target,
            Prepare(
                ticket=ticket,
                secret=secret,
                source=self._peers.address,
                request=RequestId(f"probe-{ticket}"),
                attempt=0,
                prompt=tuple(random.randrange(vocab) for _ in range(blocks * size)),  # nothing that is cached there
                generated=(),
                sampling=SamplingParams(max_tokens=1),
                fingerprint=self._card.fingerprint,
                layout=self._card.layout,
            ),
        )
        reserved: Reserved = await answer
        if len(reserved.blocks) - reserved.have_blocks < 1:
            raise _Refused(f"{wish.target.worker} reserved no block to write to")
        return reserved

    async def _open(self, wish: MeasureLink, reserved: Reserved, ticket: TicketId, secret: bytes) -> Session:
        endpoints = [
            Endpoint(offer.transport, offer.address, offer.machine)
            for offer in reserved.endpoints
            if offer.transport == wish.transport
        ]
        if not endpoints or wish.transport not in self._senders:
            raise _Refused(f"the two workers do not both use {wish.transport}; check --transfer on both")
        opening = self._thread.submit(open_session, self._senders, endpoints, ticket, secret)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(close_late)
            raise

    def _push(self, session: Session, moves: Sequence[Move]) -> tuple[float, float]:
        """In a thread: seconds of one block, and of all with their checksums, as in a handoff."""
        begun = time.perf_counter()
        session.push(moves[:1])
        session.flush()
        block_s = time.perf_counter() - begun
        begun = time.perf_counter()
        self._arena.checksums([move.source for move in moves], self._card.layout.block_size)
        session.push(moves)
        session.flush()
        return block_s, time.perf_counter() - begun
