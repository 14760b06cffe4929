"""The router's process: worker socket, request service and HTTP, composed in one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from bascule.api.admin import create_admin_app
from bascule.api.app import create_app
from bascule.api.calls import Calls
from bascule.api.context import Context
from bascule.api.server import HttpServer
from bascule.api.tokens import ModelTokenizer
from bascule.cli import servers
from bascule.cli.keys import admin_keys, api_keys, doubts, key_in_shell, tls_of
from bascule.clock import WallClock
from bascule.config import AttachConfig, HttpConfig, RoutingConfig, SloConfig
from bascule.errors import ConfigError
from bascule.keys import ClusterKey
from bascule.models import LoadedModel
from bascule.observe.decision_log import DecisionLog
from bascule.observe.metrics import Metrics
from bascule.router.attached.keeper import Attachments
from bascule.router.attached.probe import OurModel
from bascule.router.entrance import Entrance
from bascule.router.journal import Journal
from bascule.router.link import RouterLink
from bascule.router.membership import Membership
from bascule.router.service import Service
from bascule.router.view import ClusterView

log = logging.getLogger(__name__)

_DRAIN_S = 30.0


_COLLECT_AFTER = 20_000
"""Objects more than freed, before Python looks for cycles; requests leave hardly any."""


class Frontend:
    """Everything of the router's process but the workers."""

    def __init__(
        self,
        loaded: LoadedModel,
        name: str,
        routing: RoutingConfig,
        http: HttpConfig,
        slo: SloConfig,
        bind: str,
        attach: AttachConfig = AttachConfig(),
        key: ClusterKey | None = None,
    ) -> None:
        """Listens at `bind` for workers with `key`; HTTP starts with `serve_http`."""
        self._http = http
        self._check_ready_file()
        self._tls = tls_of(http)
        self._api_keys, self._admin_keys = api_keys(http), admin_keys(http)
        for doubt in doubts(http, self._api_keys, self._admin_keys):
            log.warning("%s", doubt)
        clock = WallClock()
        decision_log = DecisionLog(routing.decision_log) if routing.decision_log is not None else None
        self.journal = Journal(routing.policy, decision_log)
        view = ClusterView(tokenizer=loaded.tokenizer.digest)
        self.service = Service(view, routing, clock, slo.slo, self.journal)
        self.link = RouterLink(bind, key)
        entrance = Entrance(self.link, routing, view)
        self.membership = Membership(self.link, self.service, routing, clock, entrance)
        self.attachments = Attachments(attach, routing, _our_model(loaded, name), self.membership, clock)
        self.stop_asked = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._context = Context(
            backend=self.service,
            tokenizer=ModelTokenizer(loaded.tokenizer, loaded.chat_template, name, loaded.spec.context),
            clock=clock,
            metrics=Metrics(self.service.state, clock),
            timeout=routing.request_timeout,
            max_body=http.max_body_bytes,
            slo=slo.slo,
        )
        self._name = name
        self._announced: Path | None = None
        self._servers: list[HttpServer] = []

    def run_in_background(self) -> list[asyncio.Task[None]]:
        """Start what goes on for as long as the router lives; a task that ends before has failed."""
        tasks = [asyncio.create_task(self.membership.run())]
        if self.attachments.workers:
            tasks.append(asyncio.create_task(self.attachments.run()))
        return tasks

    def catch_signals(self) -> None:
        """The first SIGTERM or SIGINT drains, the second stops at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self._stop_now if self.stop_asked.is_set() else self.stop_asked).set()

    async def serve_http(self) -> tuple[str, str]:
        """Start listening; returns the URLs of the API and of the admin API. Raises ConfigError for a taken port."""
        admin = create_admin_app(self.service, self.journal.records, self.membership.operations, self._admin_keys)
        app = create_app(self._context, self._api_keys)
        api = await HttpServer.start(app, self._context.calls, self._http.host, self._http.port, self._tls)
        self._servers.append(api)
        operators = await HttpServer.start(admin, Calls(), "127.0.0.1", self._http.admin_port)
        self._servers.append(operators)
        self._announced = servers.announce(api.url, operators.url, self._name, *self._admin_keys[:1])
        _spare_the_collector()
        return api.url, operators.url

    def asking(self, url: str) -> str:
        """The words of a curl command line that asks the API: with its certificate and a key, where it has them."""
        certificate = f" --cacert {self._http.ssl_certfile}" if self._tls is not None else ""
        key = f' -H "Authorization: Bearer {key_in_shell(self._http)}"' if self._api_keys else ""
        return f"curl{certificate} {url}/v1/chat/completions{key} -H 'Content-Type: application/json'"

    async def drain(self, say: Callable[[str], None]) -> None:
        """Take no new requests and let those under way end, for a while or until told to stop at once."""
        if not self._servers:
            return
        api = self._servers[0]
        if self.service.active:
            say(f"finishing {self.service.active} requests; once more to stop at once")
        stopping = asyncio.create_task(api.stop(_DRAIN_S))
        at_once = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({stopping, at_once}, return_when=asyncio.FIRST_COMPLETED)
        at_once.cancel()
        await self.stop_http()
        await stopping

    async def stop_http(self) -> None:
        """Stop listening, and end what is still asked with an error that clients see; for that the rest must run yet.

        Does nothing once it is done.
        """
        await asyncio.gather(*(server.stop() for server in self._servers))

    def _check_ready_file(self) -> None:
        """Raises ConfigError if it could not be written once all is up."""
        path = self._http.ready_file
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"--ready-file {path} cannot be written; give a file in a directory that is there and yours"
            )

    def write_ready_file(self, url: str, admin_url: str, model: str) -> None:
        """Tell scripts where we listen; written whole or not at all."""
        path: Path | None = self._http.ready_file
        if path is None:
            return
        workers = [
            {"id": status.id, "role": status.role, "pid": status.pid, "class": status.device}
            for status in self.service.view.statuses()
        ]
        content = {"url": url, "admin_url": admin_url, "model": model, "pid": os.getpid(), "workers": workers}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content))
        part.replace(path)

    async def end(self, running: list[asyncio.Task[None]]) -> None:
        """End what runs in the background, and close all."""
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.link.close()
        self.journal.close()
        servers.withdraw(self._announced)
        if self._http.ready_file is not None:
            with contextlib.suppress(OSError):
                self._http.ready_file.unlink(missing_ok=True)


def _spare_the_collector() -> None:
    """What is here stays for good, so the garbage collector need not walk over it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def _our_model(loaded: LoadedModel, name: str) -> OurModel:
    return OurModel(
        name=name,
        vocab=loaded.spec.vocab,
        eos=frozenset(loaded.spec.eos_token_ids),
        encode=loaded.tokenizer.encode,
        decode=loaded.tokenizer.decode,
    )


async def first_of(running: list[asyncio.Task[None]], event: asyncio.Event, timeout: float | None = None) -> None:
    """Wait for the event, or the time; raises what ended a running task."""
    waiter = asyncio.create_task(event.wait())
    done, _ = await asyncio.wait({waiter, *running}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    for task in done & set(running):
        try:
            task.result()
        except* ConfigError as group:
            raise group.exceptions[0] from None
