"""Handoffs that come to this worker: grant blocks, check what was written, take over, and never free memory too early.

    PROMISED --blocks free--> GRANTED --Commit--> CHECKING --verified--> ACCEPTED
        |                        |                   |
        +------------------------+--- abort, cancel, expiry, mismatch ---> REFUSED

The blocks of a refused grant go back at once only when no late write is possible; until then they are quarantined.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from enum import Enum, auto

from bascule.clock import Clock
from bascule.config import HandoffConfig
from bascule.engine.core import Engine, Work
from bascule.engine.sequence import Key
from bascule.errors import RequestError
from bascule.kv.arena import Arena
from bascule.kv.books import Lease
from bascule.kv.hashing import BlockHasher
from bascule.kv.transfer.base import SECRET_BYTES
from bascule.peer_wire import (
    Abort,
    Accepted,
    Commit,
    HandoffRefused,
    Manifest,
    PeerMessage,
    Prepare,
    Renew,
    Reserved,
    Revoked,
    Written,
)
from bascule.types import Epoch, ModelCard, TicketId
from bascule.worker.deadlines import Deadlines
from bascule.worker.grants import Grants

log = logging.getLogger(__name__)

_GROWTH_TOKENS = 256
"""Output tokens that a reservation foresees room for."""


MOST_PROMISED = 1024
"""Tickets that wait for blocks; who asks when there are more decodes where it prefilled."""
_STOOD_STILL_S = 2.0
"""Seconds between two calls of `expire` that mean a paused process."""


class Stage(Enum):
    PROMISED = auto()
    GRANTED = auto()
    CHECKING = auto()
    ACCEPTED = auto()
    REFUSED = auto()


class Incoming:
    """One ticket. Its lease is the engine's once it is accepted."""

    def __init__(self, prepare: Prepare, sender: Epoch, deadline: float) -> None:
        self.prepare = prepare
        self.sender = sender
        self.deadline = deadline
        self.key = Key(prepare.request, prepare.attempt)
        self.tokens = (*prepare.prompt, *prepare.generated)
        self.stage = Stage.PROMISED
        self.lease: Lease | None = None
        self.verdict: Accepted | HandoffRefused | None = None
        self.written = 0
        """Leading blocks of the lease that may be checked."""
        self.found: list[bytes] = []
        """Checksums of what lies in the arena, of the blocks behind those that were here already."""
        self.checking = asyncio.Lock()


class DecodeSide:
    """All handoffs that come to this worker. Runs in the asyncio loop; only the checks run in a thread."""

    def __init__(
        self,
        engine: Engine,
        arena: Arena,
        hasher: BlockHasher,
        card: ModelCard,
        epoch: Epoch,
        grants: Grants,
        config: HandoffConfig,
        clock: Clock,
        answer: Callable[[Epoch, PeerMessage], None],
        wake: Callable[[], None],
        deadlines: Deadlines | None = None,
    ) -> None:
        """`answer` sends to the prefill worker with that epoch; `wake` is called when a sequence may run."""
        self.refused: Counter[str] = Counter()
        """By kind."""
        self._engine = engine
        self._arena = arena
        self._hasher = hasher
        self._card = card
        self._epoch = epoch
        self._grants = grants
        self._config = config
        self._clock = clock
        self._answer = answer
        self._wake = wake
        self._deadlines = deadlines or Deadlines()
        self._last_expiry = clock.now()
        self._tickets: dict[TicketId, Incoming] = {}
        self._promised: deque[Incoming] = deque()
        self._checks: set[asyncio.Task[None]] = set()

    @property
    def promised(self) -> int:
        """Tickets that wait for blocks."""
        return len(self._promised)

    # ------------------------------------------------------------ messages

    def apply(self, sender: Epoch, message: PeerMessage) -> None:
        """One message of a prefill worker."""
        if isinstance(message, Prepare):
            self._prepare(sender, message)
        elif isinstance(message, Written):
            self._written(message)
        elif isinstance(message, Commit):
            self._commit(sender, message)
        elif isinstance(message, Abort):
            self._aborted(message.ticket)
        elif isinstance(message, Renew):
            for ticket in message.tickets:
                if (incoming := self._tickets.get(ticket)) is not None:
                    incoming.deadline = self._next_deadline()

    def cancel(self, key: Key) -> None:
        """The router no longer wants this attempt."""
        for incoming in [one for one in self._tickets.values() if one.key == key]:
            self._refuse(incoming, "cancelled", "the request was cancelled")

    def grant_promises(self) -> None:
        """Memory may have become free: grant the tickets that wait, in order of arrival."""
        while self._promised:
            incoming = self._promised[0]
            try:
                if not self._grant(incoming):
                    return
            except Exception as error:
                log.exception("a reservation failed")
                self._refuse(incoming, "engine", f"the reservation failed: {type(error).__name__}: {error}")
            else:
                self._promised.popleft()

    def closed(self, ticket: TicketId) -> None:
        """The writer of a ticket, a handoff's or another's, says that it writes no more."""
        if self._grants.closed(ticket):
            self._freed()

    def safe(self, ticket: TicketId) -> None:
        """No late write is possible for this ticket any more: its blocks leave quarantine."""
        if self._grants.safe(ticket):
            self._freed()

    def expire(self) -> None:
        """Give up tickets that nobody renewed, and forget verdicts that nobody asks for any more."""
        now = self._clock.now()
        paused = now - self._last_expiry
        self._last_expiry = now
        if paused > _STOOD_STILL_S:
            # This process itself was paused: renewals wait unread, and their senders are not to blame.
            for incoming in self._tickets.values():
                incoming.deadline += paused
        for ticket, incoming in list(self._tickets.items()):
            if incoming.deadline > now:
                continue
            if incoming.verdict is None:
                self._refuse(incoming, "expired", "the prefill worker gave no sign of life in time")
            elif not self._grants.holds(ticket):
                del self._tickets[ticket]
        self.grant_promises()

    def _freed(self) -> None:
        self.grant_promises()
        self._wake()

    # ------------------------------------------------------------ granting

    def _prepare(self, sender: Epoch, prepare: Prepare) -> None:
        known = self._tickets.get(prepare.ticket)
        if known is not None:
            return
        incoming = Incoming(prepare, sender, self._next_deadline())
        self._tickets[prepare.ticket] = incoming
        self._deadlines.bound(incoming.key, prepare.timeout_s)
        if (mismatch := self._mismatch(prepare)) is not None:
            self._refuse(incoming, *mismatch)
            return
        if len(self._promised) >= MOST_PROMISED:
            self._refuse(incoming, "full", f"{MOST_PROMISED} handoffs wait for blocks here already")
            return
        self._promised.append(incoming)
        self.grant_promises()

    def _mismatch(self, prepare: Prepare) -> tuple[str, str] | None:
        """Why KV from this worker could not be used here: kind and reason, or None."""
        ours = self._card
        if prepare.fingerprint != ours.fingerprint:
            return "fingerprint", f"the KV is of model {prepare.fingerprint}, this worker serves {ours.fingerprint}"
        if prepare.layout != ours.layout:
            return "layout", f"the KV has layout {prepare.layout}, this worker's is {ours.layout}"
        if len(prepare.secret) != SECRET_BYTES:
            return "malformed", f"the secret has {len(prepare.secret)} bytes instead of {SECRET_BYTES}"
        if not prepare.prompt or not all(0 <= token < ours.vocab for token in (*prepare.prompt, *prepare.generated)):
            return "malformed", f"the prompt is empty or holds a token outside 0 to {ours.vocab - 1}"
        if (tokens := len(prepare.prompt) + len(prepare.generated) + 1) > (most := self._engine.most_tokens):
            return "malformed", f"{tokens} tokens are to be taken over, but this worker has room for {most}"
        return None

    def _grant(self, incoming: Incoming) -> bool:
        """Lease all blocks of a promised ticket, or none; False while there are not enough."""
        prepare = incoming.prepare
        room = min(_GROWTH_TOKENS, max(0, prepare.sampling.max_tokens - len(prepare.generated)))
        coming = sum(one.stage in (Stage.GRANTED, Stage.CHECKING) for one in self._tickets.values())
        total = len(incoming.tokens) + 1
        lease = self._engine.reserve(incoming.tokens, total, room, coming=coming, salt=prepare.salt)
        if lease is None:
            return False
        incoming.lease = lease
        incoming.stage = Stage.GRANTED
        endpoints = self._grants.open(prepare.ticket, prepare.secret, lease)
        self._answer(
            incoming.sender,
            Reserved(
                ticket=prepare.ticket,
                epoch=self._epoch,
                blocks=tuple(lease.blocks),
                have_blocks=lease.cached,
                endpoints=endpoints,
            ),
        )
        return True

    # ------------------------------------------------------------ taking over

    def _commit(self, sender: Epoch, commit: Commit) -> None:
        incoming = self._tickets.get(commit.ticket)
        if incoming is None:
            self._answer(sender, HandoffRefused(commit.ticket, "unknown", "this ticket is not known here"))
        elif incoming.verdict is not None:
            self._answer(sender, incoming.verdict)
        elif incoming.stage is Stage.GRANTED:
            incoming.stage = Stage.CHECKING
            self._in_background(self._take_over(incoming, commit))

    def _written(self, message: Written) -> None:
        """More blocks have arrived: check them while the next are computed."""
        incoming = self._tickets.get(message.ticket)
        if incoming is not None and incoming.stage is Stage.GRANTED and incoming.lease is not None:
            incoming.written = max(incoming.written, min(message.blocks, self._blocks_held(incoming)))
            self._in_background(self._check(incoming, incoming.lease))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    def _blocks_held(self, incoming: Incoming) -> int:
        """Blocks that hold all tokens of a ticket."""
        return -(-len(incoming.tokens) // self._card.layout.block_size)

    async def _check(self, incoming: Incoming, lease: Lease) -> None:
        """Take the checksums of what is written and has none, in a thread."""
        async with incoming.checking:
            first, last = lease.cached + len(incoming.found), incoming.written
            if last <= first or incoming.stage is Stage.REFUSED:
                return
            size = self._card.layout.block_size
            ends_in_last = last == self._blocks_held(incoming)
            in_last = len(incoming.tokens) - (last - 1) * size if ends_in_last else size
            incoming.found += await asyncio.to_thread(self._arena.checksums, lease.blocks[first:last], in_last)

    async def _take_over(self, incoming: Incoming, commit: Commit) -> None:
        """Check everything that was written, then decode from it."""
        lease = incoming.lease
        if lease is None:  # cancelled or expired since the commit, before this task had its first turn
            return
        fault = self._manifest_fault(incoming, lease, commit.manifest)
        if fault is None:
            incoming.written = self._blocks_held(incoming)
            await self._check(incoming, lease)
            if tuple(incoming.found) != commit.manifest.checksums:
                fault = "checksum", "the blocks that arrived are not those that were computed"
        if incoming.stage is not Stage.CHECKING:
            return
        if fault is not None:
            self._refuse(incoming, *fault)
            return
        prepare = incoming.prepare
        work = Work(
            request=prepare.request,
            attempt=prepare.attempt,
            prompt=prepare.prompt,
            generated=(*prepare.generated, commit.first_token),
            sampling=prepare.sampling,
            slo=prepare.slo,
            salt=prepare.salt,
            priority=prepare.priority,
        )
        try:
            self._engine.adopt(work, lease)
        except (RequestError, ValueError) as error:
            self._refuse(incoming, "engine", str(error))
            return
        self._grants.finish(commit.ticket)
        incoming.stage = Stage.ACCEPTED
        incoming.lease = None
        self._wake()
        self._conclude(incoming, Accepted(commit.ticket))

    def _manifest_fault(self, incoming: Incoming, lease: Lease, manifest: Manifest) -> tuple[str, str] | None:
        """The first thing in which the manifest is not what was agreed: kind and reason, or None."""
        tokens = len(incoming.tokens)
        agreed = (
            ("fingerprint", manifest.fingerprint, self._card.fingerprint),
            ("layout", manifest.layout, self._card.layout),
            ("epoch", manifest.source_epoch, incoming.prepare.source.epoch),
            ("epoch", manifest.target_epoch, self._epoch),
            ("attempt", manifest.attempt, incoming.prepare.attempt),
            ("length", manifest.tokens, tokens),
            ("length", manifest.have_blocks, lease.cached),
            ("length", len(manifest.checksums), self._blocks_held(incoming) - lease.cached),
            ("hashes", manifest.hashes, tuple(self._hasher.chain(incoming.tokens, incoming.prepare.salt))),
        )
        for kind, theirs, ours in agreed:
            if theirs != ours:
                return kind, f"the manifest's {kind} does not match: {theirs!r:.80} instead of {ours!r:.80}"
        return None

    # ------------------------------------------------------------ giving up

    def _aborted(self, ticket: TicketId) -> None:
        """The prefill side gives up, and has stopped writing."""
        incoming = self._tickets.get(ticket)
        if incoming is not None and incoming.verdict is None:
            self._refuse(incoming, "aborted", "the prefill worker gave up")
        self.closed(ticket)

    def _refuse(self, incoming: Incoming, kind: str, reason: str) -> None:
        """End a ticket without taking over. Its blocks are freed, or quarantined while someone may still write."""
        if incoming.verdict is not None:
            return
        ticket = incoming.prepare.ticket
        if incoming in self._promised:
            self._promised.remove(incoming)
        incoming.stage = Stage.REFUSED
        if not any(one.key == incoming.key and one.stage is not Stage.REFUSED for one in self._tickets.values()):
            self._deadlines.forget(incoming.key)
        if kind not in ("aborted", "cancelled"):
            self.refused[kind] += 1
            log.warning("refused a handoff of %s: %s", incoming.key.request, reason)
        # The verdict first: it says whether another round is worth while, which a revocation does not.
        self._conclude(incoming, HandoffRefused(ticket, kind, reason))
        if incoming.lease is not None:
            self._give_back(ticket, incoming.lease, incoming.sender)
            incoming.lease = None

    def _give_back(self, ticket: TicketId, lease: Lease, sender: Epoch) -> None:
        if not self._grants.give_back(ticket, lease):
            self._answer(sender, Revoked(ticket))
        self._wake()

    def _conclude(self, incoming: Incoming, verdict: Accepted | HandoffRefused) -> None:
        incoming.verdict = verdict
        incoming.deadline = self._next_deadline()
        self._answer(incoming.sender, verdict)

    def _next_deadline(self) -> float:
        return self._clock.now() + self._config.handoff_timeout
