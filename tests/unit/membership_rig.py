"""A router's membership for tests: workers join by message, and what it says to them is recorded."""

from __future__ import annotations

from collections.abc import Callable

from bascule.clock import VirtualClock
from bascule.config import RoutingConfig
from bascule.engine.mock import mock_card
from bascule.kv.hashing import BlockHasher
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView
from bascule.types import CostModel, Epoch, Role, WorkerId
from bascule.wire import (
    VERSION,
    PeerAddress,
    Register,
    Resync,
    RouterMessage,
    WorkerMessage,
    encode,
    from_router,
    from_worker,
)

PROMPT = BlockHasher("model", 1).chain(range(8))
CARD = mock_card(context=1000, vocab=100)


def offer(name: str, epoch: str = "") -> Register:
    """A mixed worker with room for 100 blocks, by default in its epoch `NAME-1`."""
    incarnation = Epoch(epoch or f"{name}-1")
    return Register(
        version=VERSION,
        worker=WorkerId(name),
        epoch=incarnation,
        role=Role.MIXED,
        card=CARD,
        device="cpu:0",
        pid=1,
        peer=PeerAddress(WorkerId(name), incarnation, "tcp://127.0.0.1:1"),
        max_sequences=4,
        kv_blocks=100,
        machine="here",
        cost=CostModel(),
    )


class FakeLink:
    """Records what the router says, as its workers would read it."""

    def __init__(self) -> None:
        self.sent: list[tuple[Epoch, RouterMessage]] = []

    def send(self, epoch: Epoch, message: RouterMessage, on_failure: Callable[[], None] | None = None) -> None:
        self.sent.append((epoch, from_router(encode(message))))


class Bench:
    """A router's membership; workers `a`, `b`, ... have the epochs `a-1`, `b-1`, ... and room for 100 blocks."""

    def __init__(self, *workers: str) -> None:
        self.clock = VirtualClock()
        self.view = ClusterView(1000)
        self.link = FakeLink()
        config = RoutingConfig()
        self.service = Service(self.view, config, self.clock)
        self.membership = Membership(self.link, self.service, config, self.clock)  # type: ignore[arg-type]
        for name in workers:
            self.hear(offer(name))

    def hear(self, message: WorkerMessage) -> None:
        sender = message.epoch  # type: ignore[union-attr]
        self.membership.apply(sender, from_worker(encode(message)))

    def resyncs(self) -> list[str]:
        """Whom the router has asked to tell anew since the last call."""
        asked = [str(epoch) for epoch, message in self.link.sent if isinstance(message, Resync)]
        self.link.sent.clear()
        return asked

    def device(self) -> list[int]:
        return [int(blocks) for blocks in self.view.index.match(PROMPT).device[: len(self.view.members)]]
