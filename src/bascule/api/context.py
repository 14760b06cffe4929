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
from bascule.errors import Unavailable
from bascule.observe.metrics import Metrics
from bascule.router.backend import Backend

REQUEST_ID = "X-Request-Id"
ROUTE = "X-Bascule-Route"
TIMEOUT = "X-Request-Timeout"

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

    def served(self) -> Served:
        """The model that answers; raises Unavailable before the first worker has registered."""
        card = self.backend.card
        if card is None:
            raise Unavailable(NOT_REGISTERED, code="not_ready")
        return Served(card, self.backend.kv_tokens)

    def check_ready(self) -> None:
        """Raises Unavailable, with the reason, while no request could be placed."""
        self.served()
        if not self.backend.ready:
            raise Unavailable(NOT_PLACEABLE, code="not_ready")


NOT_REGISTERED = "No worker has registered yet; the model may still be loading. Try again in a few seconds."
NOT_PLACEABLE = "No worker can take a request now; GET /admin/state on the admin port says why. Try again later."


def request_id_of(headers: Headers) -> str:
    """The client's own request id where it has a sane one (printable ASCII, at most 128), else a new one."""
    given = headers.get(REQUEST_ID, "").strip()
    return given if _SANE_ID.fullmatch(given) else token_hex(16)


def backend_id_of(headers: Headers, request_id: str) -> str:
    """What the backend calls the request: an id that never comes twice, though a client may send its own twice."""
    return f"{request_id}~{token_hex(4)}" if headers.get(REQUEST_ID, "").strip() == request_id else request_id


def timeout_of(headers: Headers, default: float) -> float:
    """Seconds that a request may take; raises InvalidRequest for a header that is no positive number."""
    given = headers.get(TIMEOUT)
    if given is None:
        return default
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise wrong_value(TIMEOUT, f"must be a positive number of seconds, not {given[:40]!r}.")
    return seconds
