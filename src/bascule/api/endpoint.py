"""Answers a request for tokens, at once or as a stream: the same steps for completions and chat."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bascule.api.body import Bodies, Share, read_object
from bascule.api.calls import together
from bascule.api.context import ROUTE, Context, backend_id_of, session_of, slo_of, timeout_of
from bascule.api.errors import ClientGone, internal_error, let_go
from bascule.api.events import EventStream
from bascule.api.fields import Fields
from bascule.api.forms import Writer, join
from bascule.api.outputs import Asked, Output, Outputs, outputs_of
from bascule.api.prompts import Call, Served
from bascule.api.tokens import Tokenizer
from bascule.errors import RequestError
from bascule.observe.metrics import Outcome

log = logging.getLogger(__name__)

Read = Callable[[Fields, Served, Tokenizer], Awaitable[Call]]
"""Checks a body and makes a call of it; raises InvalidRequest or NotFound."""


class TokenEndpoint:
    """An ASGI endpoint that reads a call from the body and answers it.

    Errors before the first token are HTTP statuses; later ones are an error event, after which the stream ends.
    """

    def __init__(self, context: Context, read: Read, bodies: Bodies) -> None:
        """`bodies` counts those of all endpoints."""
        self._context = context
        self._read = read
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = self._context.clock.now()
        events = EventStream(send)
        outcome = Outcome.FAILED
        share = Share(self._bodies)
        try:
            request = Request(scope, receive)
            fields = Fields(await read_object(request, self._context.max_body, share))
            await self._context.calls.run(self._answer(request, fields, share, received, events, send), receive)
            outcome = Outcome.COMPLETED
        except ClientGone as gone:
            outcome = Outcome.CANCELLED
            let_go(gone)
        except RequestError as error:
            outcome = _outcome(error)
            if not events.opened:
                raise
            let_go(error)
            await events.fail(error)
        except Exception:
            if not events.opened:
                raise
            log.exception("request %s failed", scope["state"]["request_id"])
            await events.fail(internal_error(scope["state"]["request_id"]))
        finally:
            share.release()
            self._context.metrics.ended(outcome)

    async def _answer(
        self, request: Request, fields: Fields, share: Share, received: float, events: EventStream, send: Send
    ) -> None:
        context = self._context
        served = context.served()
        call = await self._read(fields, served, context.tokenizer)
        request_id: str = request.state.request_id
        if unknown := fields.unknown():
            log.debug("request %s has fields that are not known here: %s", request_id, ", ".join(unknown))
        fields.forget()  # who sends what is not known here may send much of it, and the answer may take long
        share.release()
        asked = _asked(request, context)
        context.check_open()
        timers = [context.metrics.timer(received) for _ in range(len(call.prompts) * call.parameters.n)]
        outputs = outputs_of(call, asked, context.tokenizer, timers)
        writer = _writer(call, request_id, served)
        try:
            headers = {ROUTE: (await outputs.start(context.backend)).route}
            if call.parameters.delivery.stream:
                await events.open(headers)
                await _stream(call, outputs, writer, events)
            else:
                pieces = await together(output.all_pieces() for output in outputs.items)
                body = writer.answer([join(output) for output in pieces], outputs.usage)
                await Response(body, headers=headers, media_type="application/json")(
                    request.scope, request.receive, send
                )
        finally:
            outputs.cancel()


def _asked(request: Request, context: Context) -> Asked:
    """What the headers say; raises InvalidRequest."""
    headers, request_id = request.headers, request.state.request_id
    return Asked(
        public_id=request_id,
        backend_id=backend_id_of(headers, request_id),
        timeout=timeout_of(headers, context.timeout),
        slo=slo_of(headers, context.slo),
        session=session_of(headers),
    )


async def _stream(call: Call, outputs: Outputs, writer: Writer, events: EventStream) -> None:
    await together(_stream_output(call, output, writer, events) for output in outputs.items)
    if call.parameters.delivery.include_usage:
        await events.write(writer.usage_chunk(outputs.usage))
    await events.done()


async def _stream_output(call: Call, output: Output, writer: Writer, events: EventStream) -> None:
    """Send one output's chunks: one a delta if chunks say more than their text, else one where there is text."""
    head = writer.opening(output.index)
    every_delta = call.parameters.chunk_per_delta
    running_usage = call.parameters.delivery.continuous_usage
    finished = False
    while not finished:
        piece = await output.next_piece()
        finished = piece.finish is not None
        if piece.text or finished or every_delta:
            chunk = writer.chunk(output.index, piece, output.usage if running_usage else None)
            await events.write(head + chunk)
            head = b""


def _writer(call: Call, request_id: str, served: Served) -> Writer:
    delivery = call.parameters.delivery
    return Writer(
        call.form,
        request_id,
        int(time.time()),
        served.card.name,
        token_ids=delivery.token_ids,
        usage=delivery.include_usage,
    )


def _outcome(error: RequestError) -> Outcome:
    if error.status == HTTPStatus.TOO_MANY_REQUESTS:
        return Outcome.REJECTED
    if error.status == HTTPStatus.GATEWAY_TIMEOUT:
        return Outcome.TIMEOUT
    return Outcome.INVALID if error.status < HTTPStatus.INTERNAL_SERVER_ERROR else Outcome.FAILED
