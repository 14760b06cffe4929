"""What every endpoint of one api works with, and what it reads from a request's headers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from secrets import token_hex

from starlette.datastructures import Headers

from bascule.api.calls import Calls
from bascule.api.fields import wrong_value
from bascule.api.prompts import Served
from bascule.api.tokens import Tokenizer
from bascule.clock import Clock
from bascule.config import LEAST_SLO_S, MOST_SLO_S, MOST_TIMEOUT_S
from bascule.errors import Unavailable
from bascule.observe.metrics import Metrics
from bascule.router.backend import Backend
from bascule.types import Slo

REQUEST_ID = "X-Request-Id"
ROUTE = "X-Bascule-Route"
TIMEOUT = "X-Request-Timeout"
SLO_TTFT, SLO_TPOT, SLO_GAP = "X-SLO-TTFT", "X-SLO-TPOT", "X-SLO-Gap"
WHOLE = "bascule.whole"
"""In a request's scope where all of its body is here, so that reading it waits for nothing."""
SESSION = "X-Session-Id"

_SANE_ID = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, kw_only=True)
class Context:
    """The parts that an api is made of."""

    backend: Backend
    tokenizer: Tokenizer
    clock: Clock
    metrics: Metrics
    calls: Calls = field(default_factory=Calls)
    timeout: float
    """Seconds that a request may take unless its `X-Request-Timeout` says otherwise."""
    max_body: int
    """Bytes."""
    slo: Slo
    """The cluster's bounds, for what a request's own headers leave open."""

    def served(self) -> Served:
        """The model that answers; raises Unavailable before the first worker has registered."""
        card = self.backend.card
        if card is None:
            raise Unavailable(NOT_REGISTERED, code="not_ready")
        # While no worker is there, nobody knows what would fit; that it has to wait is said further on.
        return Served(card, self.backend.kv_tokens or card.context)

    def check_ready(self) -> None:
        """Raises Unavailable, with the reason, while no request could be placed."""
        self.check_open()
        if not self.backend.ready:
            raise Unavailable(ALL_DRAINED, code="draining")

    def check_open(self) -> None:
        """Raises Unavailable while no request would be taken, not even to wait until a worker takes some again."""
        self.served()
        if not self.backend.ready and not self.backend.draining:
            raise Unavailable(NOT_PLACEABLE, code="not_ready")


NOT_REGISTERED = "No worker has registered yet; the model may still be loading. Try again in a few seconds."
NOT_PLACEABLE = (
    "No worker can take a request now. Try again later. On the server's host, bascule admin workers lists those that "
    "are there; where there are none, the log says how they ended, or that none has come."
)
ALL_DRAINED = (
    "Every worker is drained or being started again: new requests wait, at most until their time limit. Have a worker "
    "take requests again with bascule admin resume."
)


def request_id_of(headers: Headers) -> str:
    """The client's own request id where it has a sane one (printable ASCII, at most 128), else a new one."""
    given = headers.get(REQUEST_ID, "").strip()
    return given if _SANE_ID.fullmatch(given) else token_hex(16)


def backend_id_of(headers: Headers, request_id: str) -> str:
    """What the backend calls the request: an id that never comes twice, though a client may send its own twice."""
    return f"{request_id}~{token_hex(4)}" if headers.get(REQUEST_ID, "").strip() == request_id else request_id


def timeout_of(headers: Headers, default: float) -> float:
    """Seconds that a request may take; raises InvalidRequest for a header that is no positive number, or too large."""
    seconds, most = _seconds_of(headers, TIMEOUT, default), max(default, MOST_TIMEOUT_S)
    if seconds > most:
        raise wrong_value(TIMEOUT, f"must be at most {most:g} seconds.")
    return seconds


def slo_of(headers: Headers, default: Slo) -> Slo | None:
    """The bounds that a request asks for itself, those it leaves open as in `default`; None where it names none.

    Raises InvalidRequest for a header that is no positive number.
    """
    if not any(name in headers for name in (SLO_TTFT, SLO_TPOT, SLO_GAP)):
        return None
    return Slo(
        ttft_s=_bound_of(headers, SLO_TTFT, default.ttft_s),
        tpot_s=_bound_of(headers, SLO_TPOT, default.tpot_s),
        gap_s=_bound_of(headers, SLO_GAP, default.gap_s),
    )


def session_of(headers: Headers) -> str:
    """The client's name for a conversation, empty where it gives none; raises InvalidRequest for an unusable one."""
    given = headers.get(SESSION)
    if given is None:
        return ""
    session = given.strip()
    if not _SANE_ID.fullmatch(session):
        raise wrong_value(SESSION, "must have from 1 to 128 printable ASCII characters.")
    return session


def _bound_of(headers: Headers, name: str, default: float) -> float:
    seconds = _seconds_of(headers, name, default)
    if name in headers and not LEAST_SLO_S <= seconds <= MOST_SLO_S:
        raise wrong_value(name, f"must be from {LEAST_SLO_S:g} to {MOST_SLO_S:g} seconds.")
    return seconds


def _seconds_of(headers: Headers, name: str, default: float) -> float:
    given = headers.get(name)
    if given is None:
        return default
    try:
        seconds = float(given if "_" not in given else "nan")
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise wrong_value(name, f"must be a positive number of seconds, not {given[:40]!r}.")
    return seconds
