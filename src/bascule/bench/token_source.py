"""The least that a router takes for a worker: real process and socket, no engine; each step is a token for each stream.

`bench front` uses it where the mock engine's own Python would be the bottleneck. Run as a module it joins a router:

    python -m bascule.bench.token_source MODEL --step SECONDS --join ADDRESS
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from dataclasses import dataclass
from itertools import cycle, islice

import zmq
from msgspec.structs import replace

from bascule.engine.mock import mock_card
from bascule.models import load
from bascule.types import CostModel, Epoch, FinishReason, ModelCard, RequestId, Role, WorkerId, WorkerLoad
from bascule.wire import (
    VERSION,
    Cancel,
    Heartbeat,
    PeerAddress,
    Register,
    RegistrationRefusal,
    StepTokens,
    Stop,
    Submit,
    TokenItem,
    WorkerMessage,
    encode,
    from_router,
)

TEXT = (
    "A bascule is a bridge whose two sides balance. When a ship comes, the counterweight sinks, the road rises and the "
    "channel is free; then the leaves come down again and the carts go on. "
)
"""What streams say, over and over; its tokens are of ordinary lengths."""

_WORKER = WorkerId("source")
_HEARTBEAT_S = 0.5
_KV_BLOCKS = 1 << 20


@dataclass(slots=True)
class _Stream:
    attempt: int
    position: int
    last: int


class TokenSource:
    """Streams that say `tokens` over and over, each ended by its `max_tokens`."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = list(islice(cycle(tokens), 1 << 16))
        self._streams: dict[RequestId, _Stream] = {}

    @property
    def idle(self) -> bool:
        return not self._streams

    def submit(self, submission: Submit) -> None:
        known = len(submission.generated)
        self._streams[submission.request] = _Stream(submission.attempt, known, submission.sampling.max_tokens - 1)

    def cancel(self, cancel: Cancel) -> None:
        self._streams.pop(cancel.request, None)

    def step(self) -> tuple[TokenItem, ...]:
        """The next token of every stream; one that has its last is forgotten."""
        items, tokens = [], self._tokens
        for request, stream in list(self._streams.items()):
            position = stream.position
            ends = position >= stream.last
            finish = FinishReason.LENGTH if ends else None
            items.append(TokenItem(request, stream.attempt, position, tokens[position & 0xFFFF], 0, finish))
            stream.position = position + 1
            if ends:
                del self._streams[request]
        return tuple(items)


def serve(card: ModelCard, tokens: list[int], router: str, step_s: float) -> None:
    """Join the router and make a step every `step_s` seconds while there are streams, until told to stop."""
    epoch = Epoch(f"{_WORKER}-{uuid.uuid4().hex[:12]}")
    source = TokenSource(tokens)
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, epoch.encode())
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(router)

    def send(message: WorkerMessage) -> None:
        socket.send(encode(message))

    send(_offer(card, epoch))
    beat = step = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= beat:
            send(Heartbeat(_WORKER, epoch, WorkerLoad(kv_blocks_total=_KV_BLOCKS)))
            beat = now + _HEARTBEAT_S
        if not source.idle and now >= step:
            send(StepTokens(_WORKER, epoch, source.step()))
            # A source that fell behind does not catch up: its steps would come in bursts that no engine makes.
            step = max(step + step_s, now)
        until = beat if source.idle else min(beat, step)
        if not socket.poll(max(0, int((until - time.monotonic()) * 1000))):
            continue
        message = from_router(socket.recv())
        if isinstance(message, Submit):
            source.submit(message)
        elif isinstance(message, Cancel):
            source.cancel(message)
        elif isinstance(message, RegistrationRefusal):
            sys.exit(message.reason)
        elif isinstance(message, Stop):
            return


def _offer(card: ModelCard, epoch: Epoch) -> Register:
    return Register(
        version=VERSION,
        worker=_WORKER,
        epoch=epoch,
        role=Role.MIXED,
        card=card,
        device="none",
        pid=os.getpid(),
        peer=PeerAddress(_WORKER, epoch, ""),
        max_sequences=1 << 16,
        kv_blocks=_KV_BLOCKS,
        machine="",
        cost=CostModel(),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one until it is told to stop."""
    parser = argparse.ArgumentParser(prog="token_source")
    parser.add_argument("model")
    parser.add_argument("--join", required=True)
    parser.add_argument("--step", type=float, default=0.0)
    options = parser.parse_args(arguments)
    loaded = load(options.model)
    card = mock_card(context=loaded.spec.context, vocab=loaded.spec.vocab)
    serve(replace(card, name=options.model), loaded.tokenizer.encode(TEXT), options.join, options.step)


if __name__ == "__main__":
    main()
