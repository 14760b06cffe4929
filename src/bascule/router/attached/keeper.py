"""Keeps servers attached: probes them, lets them join, listens for their heartbeats, and starts over with lost ones."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from bascule.clock import Clock
from bascule.config import AttachConfig, RoutingConfig
from bascule.errors import RegistrationRefused, short
from bascule.router.attached.client import AttachedClient, Served
from bascule.router.attached.exchange import Trouble
from bascule.router.attached.probe import OurModel, Refused, beat, probe
from bascule.router.membership import Membership
from bascule.router.pulse import HEARTBEAT_S
from bascule.router.view import Member
from bascule.types import CostModel, Epoch, KVLayout, ModelCard, Role, WorkerId, WorkerLoad
from bascule.wire import VERSION, Heartbeat, PeerAddress, Register, WorkerMessage

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request and heartbeat otherwise

_CONNECT_S = 5.0
_WRITE_S = 30.0
_IDLE_S = 2.0
"""Seconds that a connection is kept for the next request: less than servers keep it (5 s), or both would close it in
the moment when it is used again."""
_AGAIN_S = 1.0
_REFUSED_AGAIN_S = 5.0

_NO_LAYOUT = KVLayout(dtype="its own", layers=0, kv_heads=0, head_dim=0, block_size=1, planes=0, token_bytes=0)
"""Of KV that nobody here will ever see; a block is a token, so that memory can be counted in tokens."""


_A_GUESS = CostModel(step_s=0.01, token_s=0.0005)
"""What steps of a server are taken to cost, which does not tell; another worker's model would say no more."""


class Attachments:
    """All servers that were asked for, as `attached-0`, `attached-1` and so on."""

    def __init__(
        self, config: AttachConfig, routing: RoutingConfig, ours: OurModel, membership: Membership, clock: Clock
    ) -> None:
        self._keepers = [
            Keeper(WorkerId(f"attached-{index}"), url, config.attach_sequences, routing, ours, membership, clock)
            for index, url in enumerate(config.urls)
        ]

    @property
    def workers(self) -> Sequence[WorkerId]:
        return [keeper.worker for keeper in self._keepers]

    async def run(self) -> None:
        """Serve until cancelled; raises ConfigError for a server that cannot be used from the start."""
        async with asyncio.TaskGroup() as group:
            for keeper in self._keepers:
                group.create_task(keeper.run())


class Keeper:
    """One server: waited for, attached, watched; and again under a new epoch when it was lost."""

    def __init__(
        self,
        worker: WorkerId,
        url: str,
        sequences: int,
        routing: RoutingConfig,
        ours: OurModel,
        membership: Membership,
        clock: Clock,
    ) -> None:
        self.worker = worker
        self._url = url
        self._sequences = sequences
        self._silence_s = routing.suspect_after
        self._ours = ours
        self._membership = membership
        self._clock = clock
        self._model = ""
        """The server's name for the model, once it was attached."""
        self._said = ""
        self._doubt = ""
        """Why the server has to be probed again before it gets more requests; empty while it is trusted."""
        self._proof: asyncio.Task[None] | None = None

    async def run(self) -> None:
        async with _client(self._url) as http:
            while True:
                try:
                    served = await self._probe(http)
                    await self._attached(http, served)
                except (Refused, RegistrationRefused) as error:
                    if not self._model:
                        raise Refused(str(error)) from None
                    self._say(logging.ERROR, f"{self.worker} is not attached again: {error}")
                    await asyncio.sleep(_REFUSED_AGAIN_S)
                except Trouble as trouble:
                    why = f"waiting for {self._url}: {trouble.message}"
                    self._membership.stages[self.worker] = why
                    self._say(logging.WARNING, f"{self.worker}: {why}")
                    await asyncio.sleep(_AGAIN_S)

    async def _probe(self, http: httpx.AsyncClient) -> Served:
        """As `probe`; a server that was attached before must not come back with another model."""
        served = await probe(http, self._url, self._ours)
        if self._model not in ("", served.model):
            raise Refused(
                f"{self._url} serves {short(served.model)} now and served {short(self._model)} before; if that is the"
                " same model under another name, restart the router"
            )
        return served

    async def _attached(self, http: httpx.AsyncClient, served: Served) -> None:
        """Let the server join; returns when it was lost. Raises RegistrationRefused."""
        epoch = Epoch(f"{self.worker}-{uuid.uuid4().hex[:12]}")
        self._doubt = ""

        def deliver(message: WorkerMessage) -> None:
            self._membership.apply(epoch, message)

        client = AttachedClient(http, served, self.worker, epoch, deliver, lambda trouble: self._heard(member, trouble))
        member = self._membership.attach(self._offer(served, epoch), client)
        self._model, self._said = served.model, ""
        log.info("%s is %s at %s, context %d", self.worker, short(served.model), self._url, served.context)
        try:
            while self._membership.is_current(self.worker, epoch):
                await self._beat(http, served, member, client)
                await asyncio.sleep(HEARTBEAT_S)
        finally:
            client.stop()
            if self._proof is not None:
                self._proof.cancel()
                self._proof = None
            self._membership.lost(self.worker, "is no longer attached", epoch)

    async def _beat(self, http: httpx.AsyncClient, served: Served, member: Member, client: AttachedClient) -> None:
        """Listen for one heartbeat, and settle a doubt. A server that does not answer is judged by its silence."""
        try:
            async with asyncio.timeout(self._silence_s):
                await beat(http, self._url, self._ours.name, served)
            self._membership.apply(
                member.epoch, Heartbeat(self.worker, member.epoch, WorkerLoad(running=client.running))
            )
            if self._doubt and self._proof is None:
                self._proof = asyncio.create_task(self._prove(http, served, member))
        except Refused as error:
            self._membership.lost(self.worker, f"is let go: {error}", member.epoch)
        except Trouble as trouble:
            self._doubt_it(member, trouble.message)
        except TimeoutError:
            self._doubt_it(member, f"did not answer a heartbeat within {self._silence_s:g} s")

    async def _prove(self, http: httpx.AsyncClient, served: Served, member: Member) -> None:
        """Probe the server again, for it may be another one now; beside its heartbeats and its streams."""
        try:
            now = await self._probe(http)
            if now != served:
                raise Refused(f"{self._url} serves {short(now.model)} with context {now.context} now")
        except Refused as error:
            self._membership.lost(self.worker, f"is let go: {error}", member.epoch)
        except Trouble as trouble:
            log.info("%s could not be probed: it %s", self.worker, trouble.message)
        else:
            log.warning("%s is trusted again", self.worker)
            self._doubt = ""
            self._membership.rest(member, 0.0)
        self._proof = None

    def _heard(self, member: Member, trouble: Trouble) -> None:
        """A stream went wrong: leave the server alone for a while, or until it has proved itself."""
        if trouble.doubt:
            self._doubt_it(member, trouble.message)
        elif trouble.rest_s:
            self._membership.rest(member, max(member.rest_until, self._clock.now() + trouble.rest_s))

    def _doubt_it(self, member: Member, why: str) -> None:
        if not self._doubt:
            log.warning("%s gets no requests until it is probed again: it %s", self.worker, why)
        self._doubt = why
        self._membership.rest(member, math.inf)

    def _offer(self, served: Served, epoch: Epoch) -> Register:
        card = ModelCard(
            name=self._ours.name,
            fingerprint=f"attached {self._url} {served.model}",
            context=served.context,
            vocab=served.vocab,
            layout=_NO_LAYOUT,
        )
        return Register(
            version=VERSION,
            worker=self.worker,
            epoch=epoch,
            role=Role.MIXED,
            card=card,
            device=self._url,
            pid=0,
            peer=PeerAddress(self.worker, epoch, self._url),
            max_sequences=self._sequences,
            kv_blocks=served.context,
            machine="",
            keeps_apart=served.keeps_apart,
            cost=_A_GUESS,
        )

    def _say(self, level: int, message: str) -> None:
        """Log what is new."""
        if message != self._said:
            log.log(level, "%s", message)
        self._said = message


def _client(url: str) -> httpx.AsyncClient:
    """Streams may be silent for as long as the request may last; that deadline is the router's to keep.

    Cookies are never kept: they would go with other users' requests.
    """
    return httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(connect=_CONNECT_S, write=_WRITE_S, read=None, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        trust_env=False,
        follow_redirects=False,
    )
