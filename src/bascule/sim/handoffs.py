"""Handoffs between simulated workers: reserve, push what is computed while prefill goes on, commit, release.

The steps of `worker.prefill_side` and `worker.decode_side`, without what can only go wrong with bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from msgspec import Struct

from bascule.engine.core import StepResult
from bascule.engine.sequence import FORESEEN_TOKENS, Key, Work
from bascule.kv.books import Lease
from bascule.policies.handoff import OTHER_MACHINE
from bascule.sim.agenda import Agenda
from bascule.sim.network import Flow, Network
from bascule.sim.worker import SimWorker
from bascule.types import LinkCost, ModelCard, WorkerId
from bascule.wire import Submit


class HandoffTimes(Struct, frozen=True, kw_only=True):
    """What a handoff takes beside moving its bytes, in seconds."""

    message_s: float = 0.001
    """A message from one worker to another, until it is acted on."""
    push_s: float = 0.001
    """Beginning to push a chunk."""
    commit_s: float = 0.002
    """Checking what was written, and taking it over."""
    reserve_timeout: float = 5.0
    """As `config.HandoffConfig` has it."""


_SHORTEST_S = 1e-6
_TELLING_BYTES = 1 << 16
"""A smaller push says how long a call takes, not how fast bytes go."""


class _Outgoing:
    """One handoff."""

    def __init__(self, submission: Submit, source: SimWorker, target: SimWorker) -> None:
        self.submission = submission
        self.key = Key(submission.request, submission.attempt)
        self.source = source
        self.target = target
        self.lease: Lease | None = None
        """The decode worker's blocks for it, until they are the engine's."""
        self.reserved = False
        """The prefill worker knows of them."""
        self.sent_blocks = 0
        """Leading blocks that lie there, or are on their way."""
        self.computed_blocks = 0
        self.first_token_at = -1.0
        self.late_bytes = 0.0
        """KV pushed after that."""
        self.rate = OTHER_MACHINE.bytes_per_s
        """Bytes per second, as the latest push shows it."""
        self.flow: Flow | None = None
        self.pushing = self.committing = self.ended = False


class Handoffs:
    """All handoffs of a cluster."""

    def __init__(
        self,
        agenda: Agenda,
        network: Network,
        workers: dict[WorkerId, SimWorker],
        card: ModelCard,
        times: HandoffTimes,
        learnt: Callable[[WorkerId, WorkerId, LinkCost], None],
    ) -> None:
        """`learnt` is told what each handoff shows of its link, as workers' heartbeats tell it."""
        self.count = 0
        """Taken over by a decode worker."""
        self.kept = 0
        """Of requests that went on where they were, because no blocks were to be had in time."""
        self.bytes = 0.0
        """Pushed."""
        self._agenda = agenda
        self._network = network
        self._workers = workers
        self._size = card.layout.block_size
        self._block_bytes = card.layout.block_bytes
        self._times = times
        self._learnt = learnt
        self._going: dict[Key, _Outgoing] = {}
        self._promised: dict[WorkerId, deque[_Outgoing]] = {}
        for worker in workers.values():
            worker.on_submit = partial(self._begin, worker)
            worker.on_progress = self._progressed
            worker.on_cancel = partial(self._cancelled, worker)
            worker.on_freed = partial(self._grant, worker)

    def worker_died(self, worker: SimWorker) -> None:
        """Nothing comes from it any more, nor goes to it; the router places the requests anew."""
        for handoff in [one for one in self._going.values() if worker in (one.source, one.target)]:
            self._end(handoff)

    # ------------------------------------------------------------ the way of one

    def _begin(self, source: SimWorker, submission: Submit) -> None:
        assert submission.decode is not None
        handoff = _Outgoing(submission, source, self._workers[submission.decode.worker])
        self._going[handoff.key] = handoff
        self._agenda.after(self._times.message_s, partial(self._prepare, handoff))
        self._agenda.after(self._times.reserve_timeout, partial(self._expire, handoff))

    def _prepare(self, handoff: _Outgoing) -> None:
        if not handoff.ended:
            self._promised.setdefault(handoff.target.id, deque()).append(handoff)
            self._grant(handoff.target)

    def _grant(self, target: SimWorker) -> None:
        """Memory may be free: reserve for those that wait, in their order."""
        waiting = self._promised.get(target.id)
        while waiting:
            if not waiting[0].ended and not self._reserve(waiting[0]):
                return
            waiting.popleft()

    def _reserve(self, handoff: _Outgoing) -> bool:
        submission = handoff.submission
        tokens = submission.prompt + submission.generated
        room = min(FORESEEN_TOKENS, max(0, submission.sampling.max_tokens - len(submission.generated)))
        handoff.lease = handoff.target.engine.reserve(tokens, len(tokens) + 1, room, salt=submission.salt)
        if handoff.lease is None:
            return False
        handoff.sent_blocks = handoff.lease.cached
        self._agenda.after(self._times.message_s, partial(self._permit, handoff))
        return True

    def _permit(self, handoff: _Outgoing) -> None:
        if not handoff.ended:
            handoff.reserved = True
            handoff.source.engine.permit(*handoff.key)
            handoff.source.wake()
            self._go_on(handoff)

    def _expire(self, handoff: _Outgoing) -> None:
        """No blocks in time: it decodes where its KV is."""
        if not handoff.ended and not handoff.reserved:
            self.kept += 1
            self._end(handoff)
            handoff.source.engine.keep(*handoff.key)
            handoff.source.wake()

    def _progressed(self, result: StepResult) -> None:
        for chunk in result.progress:
            handoff = self._going.get(Key(chunk.request, chunk.attempt))
            if handoff is not None:
                full, rest = divmod(chunk.computed, self._size)
                handoff.computed_blocks = full + (1 if chunk.last and rest else 0)
                if chunk.last:
                    handoff.first_token_at = self._agenda.now()
                self._go_on(handoff)
        for output in result.outputs:
            if output.finish is not None and (ended := self._going.get(Key(output.request, output.attempt))):
                self._end(ended)

    def _go_on(self, handoff: _Outgoing) -> None:
        """Push what is computed and has not been pushed, one chunk after another; commit at the end."""
        if handoff.ended or not handoff.reserved or handoff.pushing or handoff.committing:
            return
        if handoff.computed_blocks > handoff.sent_blocks:
            handoff.pushing = True
            self._agenda.after(self._times.push_s, partial(self._push, handoff))
        elif handoff.first_token_at >= 0:
            handoff.committing = True
            self._agenda.after(self._times.commit_s, partial(self._adopt, handoff))

    def _push(self, handoff: _Outgoing) -> None:
        if handoff.ended:
            return
        size = float((handoff.computed_blocks - handoff.sent_blocks) * self._block_bytes)
        handoff.sent_blocks = handoff.computed_blocks
        self.bytes += size
        if handoff.first_token_at >= 0:
            handoff.late_bytes += size
        ends = handoff.source.machine, handoff.target.machine
        begun = self._agenda.now()
        handoff.flow = self._network.send(*ends, size, partial(self._pushed, handoff, size, begun))

    def _pushed(self, handoff: _Outgoing, size: float, begun: float) -> None:
        handoff.flow, handoff.pushing = None, False
        took = self._agenda.now() - begun
        handoff.rate = size / took if took > 0 and size >= _TELLING_BYTES else OTHER_MACHINE.bytes_per_s
        self._go_on(handoff)

    def _adopt(self, handoff: _Outgoing) -> None:
        if handoff.ended or handoff.lease is None:
            return
        submission = handoff.submission
        work = Work(
            request=submission.request,
            attempt=submission.attempt,
            prompt=submission.prompt,
            generated=(*submission.generated, 0),
            sampling=submission.sampling,
            slo=submission.slo,
            salt=submission.salt,
            priority=submission.priority,
        )
        handoff.target.engine.adopt(work, handoff.lease)
        handoff.lease = None
        self._end(handoff)
        self.count += 1
        handoff.target.wake()
        self._agenda.after(self._times.message_s, partial(self._release, handoff))

    def _release(self, handoff: _Outgoing) -> None:
        source = handoff.source
        if source.alive:
            source.engine.release(*handoff.key)
            source.wake()
            self._grant(source)
        exposed = self._agenda.now() - handoff.first_token_at - handoff.late_bytes / handoff.rate
        self._learnt(source.id, handoff.target.id, LinkCost(max(exposed, _SHORTEST_S), handoff.rate))

    # ------------------------------------------------------------ the end

    def _cancelled(self, worker: SimWorker, key: Key) -> None:
        handoff = self._going.get(key)
        if handoff is not None and worker in (handoff.source, handoff.target):
            self._end(handoff)

    def _end(self, handoff: _Outgoing) -> None:
        handoff.ended = True
        self._going.pop(handoff.key, None)
        if handoff.flow is not None:
            self._network.stop(handoff.flow)
        if handoff.lease is not None:
            handoff.lease.release()
            handoff.lease = None
            self._grant(handoff.target)
