"""One Redis or Valkey server of the remote tier: bounded connections, pipelined commands, nothing retried."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, TypeAlias

import redis
from msgspec import Struct
from redis._parsers import _RESP2Parser
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.retry import Retry

from bascule.kv.store.base import Fault
from bascule.kv.store.gate import Gate
from bascule.kv.store.targets import Target

Command: TypeAlias = tuple[Any, ...]

_READ_BYTES = 1 << 20
_SCAN_COUNT = 1000
_MOST_STEPS = 1_000_000
"""Of a walk over all keys: some 10**9 keys."""
_WALK_S = 600.0
_TOO_MANY = 1 << 56
"""Bytes or keys: no server has so many, and what sums of them are sent in has room for them."""


class HungUp(Exception):
    """Another call has closed the connection under this one: what that one has failed of is in `fault`."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"given up with another call, which was {fault}")
        self.fault = fault


def fault_of(error: Exception) -> Fault:
    """What a command, or the connection under it, has failed of."""
    if isinstance(error, HungUp):
        return error.fault
    if isinstance(error, OutOfMemoryError):
        return Fault.FULL
    if isinstance(error, AuthenticationError | NoPermissionError | ReadOnlyError):
        return Fault.DENIED
    if isinstance(error, redis.TimeoutError | TimeoutError):
        return Fault.SLOW
    if isinstance(error, redis.ConnectionError | OSError):
        return Fault.GONE
    return Fault.BROKEN


class ServerFacts(Struct, frozen=True):
    """What a server says of itself; no capacity is 0."""

    keys: int
    bytes: int
    capacity_bytes: int
    evictions: int
    policy: str = ""
    """What it evicts when it is full (`maxmemory-policy`); empty if it does not tell."""


class Walk:
    """Where a walk over a server's keys is. It has an end, even with a server that never comes to one."""

    def __init__(self) -> None:
        self.cursor = 0
        self.ended = False
        self._steps = 0
        self._took_s = 0.0

    def go_on(self, cursor: int, seconds: float) -> None:
        """The server has told some keys in that time, and with which cursor to ask it for the next ones.

        Raises ResponseError after more steps, or more time, than any server's keys take.
        """
        self.cursor, self.ended = cursor, not cursor
        self._steps += 1
        self._took_s += seconds
        if not self.ended and (self._steps >= _MOST_STEPS or self._took_s >= _WALK_S):
            raise ResponseError(f"SCAN had no end after {self._steps} answers")


class Server:
    """Connections to one server, at most `connections`, and the gate before them. Nothing is sent before it is used."""

    def __init__(self, target: Target, *, connections: int, connect_s: float, timeout_s: float) -> None:
        self.label = target.label
        self._hang_ups = 0
        self._hung_up_for = Fault.CLOSED
        """Why all connections were closed the last time."""
        self._client = redis.Redis(
            connection_pool=redis.ConnectionPool.from_url(
                target.url,
                max_connections=connections + 1,  # the probe has one of its own
                socket_connect_timeout=connect_s,
                socket_timeout=timeout_s,
                socket_read_size=_READ_BYTES,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                # hiredis makes room for as many elements as an answer announces, and holds the whole process up for
                # seconds when it gives that back; large values are read more slowly by it, too.
                parser_class=_RESP2Parser,
            )
        )
        self.gate = Gate(
            f"server {self.label}",
            lanes=connections,
            timeout_s=timeout_s,
            classify=fault_of,
            probe=self.ping,
            interrupt=self._give_up,
        )

    def pipeline(self, commands: Sequence[Command]) -> list[object]:
        """The replies, one a command, in order; a refusal of a command is an exception in its place.

        Raises what redis-py raises if the connection fails or the server talks nonsense, and HungUp.
        """
        hang_ups = self._hang_ups
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        try:
            replies = pipeline.execute(raise_on_error=False)
        except Exception as error:
            if hang_ups < self._hang_ups:
                raise HungUp(self._hung_up_for) from error
            if not isinstance(error, redis.ConnectionError):
                self._hang_up(fault_of(error))  # what else is in the connection's buffer is nobody's answer
            raise
        for reply in replies:
            if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                raise reply
        return list(replies)

    def facts(self) -> ServerFacts:
        """Raises like `pipeline`, and ResponseError for a refusal or an answer that makes no sense."""
        replies = self.pipeline([("DBSIZE",), ("INFO", "memory"), ("INFO", "stats")])
        match replies:
            case [int(keys), dict(memory), dict(stats)]:
                pass
            case _:
                raise ResponseError("not an answer to DBSIZE and INFO")
        numbers: list[Any] = [keys, memory.get("used_memory"), memory.get("maxmemory", 0), stats.get("evicted_keys")]
        if not all(isinstance(number, int) and 0 <= number < _TOO_MANY for number in numbers):
            raise ResponseError("no number of keys or bytes in an answer to DBSIZE and INFO")
        used, capacity, evictions = numbers[1:]
        return ServerFacts(keys, used, capacity, evictions, str(memory.get("maxmemory_policy", "")))

    def scan(self, prefix: bytes, walk: Walk) -> list[bytes]:
        """Some of the keys that begin with `prefix`, until `walk` has ended; some come twice."""
        begun = monotonic()
        match self.pipeline([("SCAN", walk.cursor, "MATCH", prefix + b"*", "COUNT", _SCAN_COUNT)]):
            case [(int(following), list(keys))]:
                walk.go_on(following, monotonic() - begun)
                return keys
            case [ResponseError() as refusal]:
                raise refusal
            case _:
                raise ResponseError("not an answer to SCAN")

    def unlink_some(self, prefix: bytes, walk: Walk) -> None:
        """Delete some of the keys that begin with `prefix`, like `scan`."""
        if keys := self.scan(prefix, walk):
            self.pipeline([("UNLINK", *keys)])

    def close(self) -> None:
        """Idempotent."""
        self.gate.close()
        self._hang_up(Fault.CLOSED)

    def ping(self) -> None:
        """Raises like `pipeline`, and ResponseError for a refusal or another answer."""
        if self.pipeline([("PING",)]) not in ([True], [b"PONG"]):
            raise ResponseError("not an answer to PING")

    def _give_up(self) -> None:
        self._hang_up(Fault.SLOW)

    def _hang_up(self, fault: Fault) -> None:
        self._hung_up_for = fault
        self._hang_ups += 1
        self._client.connection_pool.disconnect(inuse_connections=True)
