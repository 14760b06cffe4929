"""What `doctor` asks of the servers that others run: those of the KV store's remote tier, and attached ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import httpx
from redis.exceptions import ResponseError

from bascule.cli.fitness import Finding, Level
from bascule.config import AttachConfig, StoreConfig
from bascule.errors import short
from bascule.kv.store.base import Fault
from bascule.kv.store.remote import POLICY
from bascule.kv.store.server import Server, fault_of
from bascule.kv.store.targets import Target, parse_remote
from bascule.router.attached.exchange import Trouble
from bascule.router.attached.probe import Refused, find_model

ANSWER_S = 2.0
_WHY = {
    Fault.DENIED: "refuses us",
    Fault.SLOW: f"gave no answer within {ANSWER_S:g} s",
    Fault.GONE: "cannot be connected to",
}
_MEND_POLICY = (
    f"make it {POLICY}: others take no new blocks, or the beginnings of prompts, without which the rest is of no use"
)
_MEND_STORE = "see that it runs, or mend the URL, its password and database; until then it is done without"


def of_servers(store: StoreConfig, attach: AttachConfig, model: str) -> Iterator[Finding]:
    """A finding for each; `model` is the name that requests call ours by. Raises ConfigError for a malformed URL."""
    for target in parse_remote(store.kv_remote) if store.kv_remote is not None else ():
        yield from _of_store(target)
    for url in attach.urls:
        yield asyncio.run(_attached(url, model))


def _of_store(target: Target) -> Iterator[Finding]:
    """Whether a server of the store takes and gives anything now, and what it evicts when it is full."""
    what = f"the KV store's server {target.label}"
    server = Server(target, connections=1, connect_s=ANSWER_S, timeout_s=ANSWER_S)
    try:
        server.ping()
        yield Finding(Level.OK, f"{what} answers")
        with suppress(ResponseError):  # servers for hire do not tell everyone
            facts = server.facts()
            if facts.capacity_bytes and facts.policy not in ("", POLICY):
                yield Finding(Level.DOUBT, f"{what} has maxmemory-policy {short(facts.policy)}", _MEND_POLICY)
    except Exception as error:  # whatever a server that is none can make redis-py raise
        why = _WHY.get(fault_of(error), "is no Redis or Valkey server that works")
        yield Finding(Level.DOUBT, f"{what} {why} ({short(str(error))})", _MEND_STORE)
    finally:
        server.close()


async def _attached(url: str, model: str) -> Finding:
    """Whether a server is there and has the model; its tokens are compared when it is attached."""
    try:
        async with asyncio.timeout(ANSWER_S), httpx.AsyncClient(base_url=url) as http:
            entry = await find_model(http, url, model)
    except Refused as refused:
        return Finding(Level.WRONG, str(refused))
    except Trouble as trouble:
        return Finding(Level.DOUBT, f"{url} {trouble.message}", "requests wait, or go elsewhere, until it serves")
    except Exception as error:  # whatever an answer can make the HTTP client raise
        why = short(str(error)) or f"no answer within {ANSWER_S:g} s"
        return Finding(Level.DOUBT, f"{url} does not answer ({why})", "start it, or mend the URL of --attach")
    return Finding(Level.OK, f"{url} serves {short(entry.id)}")
