"""Faults that wait for a certain request to come to a phase: the worker dies, sleeps, hangs, or loses what is said."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from bascule.engine.core import Progress, StepResult
from bascule.engine.mock import MockRunner
from bascule.peer_wire import Accepted, Commit, Written
from bascule.wire import StepTokens, Submit, TokenItem
from bascule.worker import steploop
from bascule.worker.arrivals import Arrivals
from bascule.worker.decode_side import DecodeSide
from bascule.worker.link import RouterSocket
from bascule.worker.prefill_side import PrefillSide
from bascule.worker.worker import Worker
from chaos.orders import Order, Orders

ENDS = ("die", "sleep", "note")
HUNG_S = 3.0
"""For how long a worker that hangs to order waits for the end of a step."""
MID_STREAM = 10
"""The position at which a request counts as decoding."""


def phase_of(phase: str, request: str, attempt: int) -> str:
    """As `Order.what` says it, with the id that the client knows. No order is for a later attempt."""
    return f"{phase} {request.split('~')[0]}" if not attempt else "a later attempt"


def end_here(orders: Orders, order: Order, request: str, detail: str) -> None:
    """Stop this process, which whoever reads the report wakes, or end it. Of a `note` there is only the report."""
    orders.report(order, request, detail)
    if order.fault != "note":
        os.kill(os.getpid(), signal.SIGKILL if order.fault == "die" else signal.SIGSTOP)
        time.sleep(0)  # the signal is taken here at the latest


def hang_here(orders: Orders, order: Order, request: str, detail: str) -> None:
    """Let the next step never end; all else in this process goes on."""
    steploop._LEAST_S = steploop._FIRST_S = HUNG_S
    MockRunner.execute = lambda *_: time.sleep(1e6)  # type: ignore[method-assign, assignment, return-value]
    orders.report(order, request, detail)


def end_at_phases(orders: Orders) -> None:
    """Those in the middle of a write are elsewhere, where writes are bent."""

    def reached(phase: str, request: str, attempt: int) -> None:
        if (order := orders.take(*ENDS, what=phase_of(phase, request, attempt))) is not None:
            end_here(orders, order, request, phase)
        elif (order := orders.take("hang", what=phase_of(phase, request, attempt))) is not None:
            hang_here(orders, order, request, phase)

    _while_prefilling(reached)
    _while_decoding(reached)


def _while_prefilling(reached: Callable[[str, str, int], None]) -> None:
    begin, progress, apply = Arrivals._begin, PrefillSide.progressed, PrefillSide.apply

    def begun(self: Arrivals, submission: Submit) -> None:
        begin(self, submission)
        reached("queued", submission.request, submission.attempt)

    def progressed(self: PrefillSide, made: Progress) -> None:
        if not made.last:
            reached("prefilling", made.request, made.attempt)
        progress(self, made)

    def applied(self: PrefillSide, message: Any) -> None:
        if isinstance(message, Accepted) and (handoff := self._by_ticket.get(message.ticket)) is not None:
            reached("accepted", *handoff.key)
        apply(self, message)

    Arrivals._begin = begun  # type: ignore[method-assign]
    PrefillSide.progressed = progressed  # type: ignore[method-assign]
    PrefillSide.apply = applied  # type: ignore[method-assign]


def _while_decoding(reached: Callable[[str, str, int], None]) -> None:
    apply, publish = DecodeSide.apply, Worker._publish

    def applied(self: DecodeSide, sender: Any, message: Any) -> None:
        if isinstance(message, Written | Commit) and (incoming := self._tickets.get(message.ticket)) is not None:
            reached("written" if isinstance(message, Written) else "committed", *incoming.key)
        apply(self, sender, message)

    def published(self: Worker, result: StepResult) -> None:
        publish(self, result)
        for output in result.outputs:
            if output.position == MID_STREAM:
                reached("decoding", output.request, output.attempt)

    DecodeSide.apply = applied  # type: ignore[method-assign]
    Worker._publish = published  # type: ignore[method-assign]


def lose_on_the_way(orders: Orders) -> None:
    """What a connection between router and worker that breaks has lost: a submission, a token, the last token."""
    send, serve = RouterSocket.send, RouterSocket.serve

    def lost(phase: str, request: str, attempt: int) -> bool:
        if (order := orders.take("drop", what=phase_of(phase, request, attempt))) is None:
            return False
        orders.report(order, request, phase)
        return True

    def is_lost(item: TokenItem) -> bool:
        phase = "ending" if item.finish is not None else "decoding" if item.position == MID_STREAM else ""
        return bool(phase) and lost(phase, item.request, item.attempt)

    def sent(self: RouterSocket, message: Any) -> None:
        if isinstance(message, StepTokens):
            message = replace(message, items=tuple(item for item in message.items if not is_lost(item)))
        send(self, message)

    async def served(self: RouterSocket, handler: Callable[[Any], None]) -> None:
        def heard(message: Any) -> None:
            if not isinstance(message, Submit) or not lost("queued", message.request, message.attempt):
                handler(message)

        await serve(self, heard)

    RouterSocket.send = sent  # type: ignore[method-assign]
    RouterSocket.serve = served  # type: ignore[method-assign]
