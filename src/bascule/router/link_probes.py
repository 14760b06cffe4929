"""Links between workers measured when an operator asks: who may be, one at a time, and what the answer means."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from statistics import median

from bascule.errors import Conflict, WorkerFailure
from bascule.link_wire import LinkMeasured, MeasureLink
from bascule.router.backend import LinkReport
from bascule.router.view import ClusterView, Member
from bascule.types import Epoch, WorkerId
from bascule.wire import RouterMessage

ANSWER_S = 8.0
"""A worker answers within 5 s, unless it cannot be reached."""
_BEYOND = 0.1
"""By so much of one block's time all must take longer, or the difference is chance."""


class LinkProbes:
    """Runs in the router's loop. What the workers do for it leaves nothing behind, so nothing is to be taken back."""

    def __init__(self, view: ClusterView, send: Callable[[Epoch, RouterMessage], None]) -> None:
        self._view = view
        self._send = send
        self._wish: MeasureLink | None = None
        self._ends: tuple[WorkerId, ...] = ()
        self._answer: asyncio.Future[LinkMeasured] | None = None

    async def measure(self, source: Member, target: Member, transport: str, size: int, runs: int) -> LinkReport:
        """See `Operations.measure_link`."""
        self._require(source, target, transport)
        layout = source.registration.card.layout
        wish = MeasureLink(
            probe=uuid.uuid4().hex,
            target=target.registration.peer,
            transport=transport,
            blocks=max(1, min(size // layout.block_bytes, target.registration.kv_blocks // 2, _room(target))),
            runs=runs,
        )
        self._wish, self._ends = wish, (source.id, target.id)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._send(source.epoch, wish)
            async with asyncio.timeout(ANSWER_S):
                found = await self._answer
        except TimeoutError:
            raise WorkerFailure(
                f"Worker {source.id} did not say within {ANSWER_S:g} s what the link takes; see its log.",
                code="unheard",
            ) from None
        finally:
            self._wish, self._ends, self._answer = None, (), None
        if found.reason or not found.push_s:
            raise Conflict(
                f"The link from {source.id} to {target.id} over {transport} was not measured: {found.reason}.",
                code="busy" if found.busy else "not_measured",
            )
        return _report(source, target, transport, found)

    def heard(self, message: LinkMeasured) -> None:
        """A worker's answer; one to an earlier question is ignored."""
        asked = self._wish is not None and message.probe == self._wish.probe
        if asked and self._answer is not None and not self._answer.done():
            self._answer.set_result(message)

    def lost(self, worker: WorkerId) -> None:
        """A worker is gone, and answers no more."""
        if worker in self._ends and self._answer is not None and not self._answer.done():
            self._answer.set_exception(
                WorkerFailure(f"Worker {worker} was lost while its link was measured.", code="lost")
            )

    def _require(self, source: Member, target: Member, transport: str) -> None:
        """Raises Conflict for a link that is none, or cannot be measured now."""
        if source is target:
            raise Conflict(f"{source.id} does not hand over to itself; name two workers.", code="one_worker")
        for member in (source, target):
            if member.attached:
                raise Conflict(f"{member.id} is an attached server, which hands nothing over.", code="attached")
        if transport == "shm" and source.registration.machine != target.registration.machine:
            raise Conflict(
                f"{source.id} and {target.id} are on two machines, which share no memory; measure tcp.", code="apart"
            )
        if self._answer is not None:
            raise Conflict("Another link is being measured; try again in a few seconds.", code="busy")
        for member in (source, target):
            if member.suspect:
                raise Conflict(f"Worker {member.id} sends no heartbeats; try again once it does.", code="busy")
        if (why := source.load.unreachable.get(target.id)) is not None:
            raise Conflict(f"{source.id} does not reach {target.id} at {why}.", code="not_measured")
        if target.load.promised or _room(target) < 1:
            raise Conflict(f"{target.id} has no room for KV now; try again later.", code="busy")
        step = target.load.step
        if step is not None and step.prefilling:
            raise Conflict(f"{target.id} has {step.prefilling} prompts to compute; try again later.", code="busy")


def _report(source: Member, target: Member, transport: str, found: LinkMeasured) -> LinkReport:
    registration, card = source.registration, source.registration.card
    size = found.blocks * card.layout.block_bytes
    return LinkReport(
        source=source.id,
        target=target.id,
        transport=transport,
        same_machine=registration.machine == target.registration.machine,
        devices=(registration.device, target.registration.device),
        bytes=size,
        reserve_s=found.reserve_s,
        block_s=found.block_s,
        push_s=found.push_s,
        latency_s=median(found.reserve_s) + median(found.block_s),
        bytes_per_s=_rate(size, found),
        model=card.name,
        fingerprint=card.fingerprint,
        context=card.context,
        kv_token_bytes=card.layout.planes * card.layout.token_bytes,
        chunk_tokens=registration.chunk_tokens,
        cost=source.load.cost or registration.cost,
    )


def _room(target: Member) -> int:
    """Blocks that nothing holds, as of its latest heartbeat: more would wait, and what comes behind it too."""
    return target.registration.kv_blocks - target.load.kv_blocks_leased - target.load.kv_blocks_quarantined


def _rate(size: int, found: LinkMeasured) -> float:
    """Bytes/s: what further blocks took beyond the first, which has the way there and back in it, as all have."""
    block_s, push_s = median(found.block_s), median(found.push_s)
    if found.blocks > 1 and push_s > (1 + _BEYOND) * block_s:
        return size * (1 - 1 / found.blocks) / (push_s - block_s)
    return size / max(push_s, 1e-9)
