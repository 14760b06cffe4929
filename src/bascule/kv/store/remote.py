"""The `remote` tier: blocks on one or several Redis or Valkey servers, each block on the one that the ring names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from time import monotonic

from redis.exceptions import ResponseError

from bascule.kv.store.base import Blob, Fault, StoreStats, Tally, Use
from bascule.kv.store.gate import Job
from bascule.kv.store.ring import Ring
from bascule.kv.store.server import Command, Server, ServerFacts, Walk, fault_of
from bascule.kv.store.standing import Standing
from bascule.kv.store.targets import Target
from bascule.kv.transfer.base import machine_id
from bascule.types import BlockHash, Tier

PREFIX = b"bascule:1:"
_KEY = re.compile(re.escape(PREFIX) + rb"([0-9a-f]{32})")
CONNECT_S = 0.2
TIMEOUT_S = 0.5
TTL_S = 86_400
_DEEPER_PARTS = 345_600
_AGAIN_PARTS = 720
"""A block lives one of so many parts of the time to live less for each block in front of it, and longer if it was used
again: 0.25 s and 2 minutes of a day. So a server that evicts what expires first lets ends go before beginnings, and
what was used once before what was used again."""
POLICY = "volatile-ttl"
"""The `maxmemory-policy` for that."""
CONNECTIONS = 4
_ROUND_BYTES = 2 << 20
"""In one round, so that it ends within the timeout at 100 Mbit/s."""
_MOST_KEYS = 256

Take = Callable[[int, object], bool]
"""Takes the reply for the block at a place of the call's list; whether it made sense."""


class _Part:
    """What one server is asked in a call."""

    def __init__(self, server: str, places: Sequence[int]) -> None:
        self.server = server
        self.places = places
        self.refused: list[int] = []
        self.refusal: Exception | None = None
        """The latest."""
        self.done = False
        """All rounds were."""


class RemoteStore:
    """Blocks on `servers`, each kept about `ttl_s` seconds after it was last written or used.

    A call is as many rounds of about 2 MiB to each server as it takes, to all servers at once, and waits `timeout_s`
    for each round. A server that is gone or hangs costs one such wait, and its share are misses. While it is gone, or
    refuses what is put on it, the others keep what is put of its share, and are asked for what it lacks afterwards.
    Needs Redis 6.2, or any Valkey.
    """

    tier = Tier.REMOTE

    def __init__(
        self,
        servers: Sequence[Target],
        *,
        ttl_s: int = TTL_S,
        connect_s: float = CONNECT_S,
        timeout_s: float = TIMEOUT_S,
        connections: int = CONNECTIONS,
    ) -> None:
        """`targets.parse_remote` makes and checks `servers`; none of them needs to be there yet."""
        self._servers = {
            target.label: Server(target, connections=connections, connect_s=connect_s, timeout_s=timeout_s)
            for target in servers
        }
        self.place = ",".join(
            sorted(f"{target.label} of {machine_id()}" if target.local else target.label for target in servers)
        )
        self._ring = Ring(list(self._servers))
        self._standing = Standing(ttl_s)
        self._ttl_s = ttl_s
        self._tally = Tally()
        self._typical_bytes = _ROUND_BYTES // 4
        """A block's size, as last seen."""
        self._evicted: dict[str, int] = {}
        """What each server had evicted since its own start when it was last asked."""
        self._closed = False

    def put(self, items: Mapping[BlockHash, Blob]) -> int:
        names, values = list(items), list(items.values())
        self._learn_size(max(map(len, values), default=0))
        taken: list[int] = []

        def take(index: int, reply: object) -> bool:
            if reply in (True, b"OK"):
                taken.append(index)
                return True
            return False

        def command(index: int) -> Command:
            return ("SET", key_of(names[index]), values[index], "EX", self._ttl_s)

        left, present = list(range(len(names))), self._present()
        passed = self._standing.refusing() & present
        if passed == present:
            passed = set()
        while left:
            parts = self._each(names, left, dict.fromkeys(left, passed), present, command, take, self._typical_bytes)
            for part in parts:
                if part.refusal is not None:
                    self._standing.refused(part.server, part.refusal)
                elif part.done:
                    self._standing.took(part.server)
            left = [index for part in parts for index in part.refused]
            passed = passed | {part.server for part in parts if part.refused}
            if passed >= present:
                break
        return len(taken)

    def get(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        answers = self.peek(names)
        self._tally.answered(answers)
        return answers

    def peek(self, names: Sequence[BlockHash]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(names)

        def take(index: int, reply: object) -> bool:
            if isinstance(reply, bytes):
                found[index] = reply
                self._learn_size(len(reply))
            return reply is None or isinstance(reply, bytes)

        self._search(
            names, lambda i: ("GET", key_of(names[i])), take, lambda i: found[i] is not None, self._typical_bytes
        )
        return list(found)  # a round that was given up may still write to the other

    def holds(self, names: Sequence[BlockHash]) -> list[bool]:
        return self._whether(names, lambda i: ("EXISTS", key_of(names[i])))

    def touch(self, uses: Sequence[Use]) -> list[bool]:
        now = monotonic()

        def renew(index: int) -> Command:
            use = uses[index]
            life_s = self._ttl_s * (1 + use.again / _AGAIN_PARTS - use.depth / _DEEPER_PARTS)
            return ("PEXPIRE", key_of(use.name), max(1, int(1000 * (life_s - (now - use.at)))))

        return self._whether([use.name for use in uses], renew)

    def _whether(self, names: Sequence[BlockHash], ask: Callable[[int], Command]) -> list[bool]:
        """For each of `names`, whether the server says yes to what it is asked of it."""
        found = [False] * len(names)

        def take(index: int, reply: object) -> bool:
            found[index] = reply == 1
            return reply in (0, 1)

        self._search(names, ask, take, lambda i: found[i])
        return list(found)

    def names(self) -> Iterator[list[BlockHash]]:
        for server in self._servers.values():
            walk, keys = Walk(), list[bytes]()

            def look(server: Server, walk: Walk = walk) -> None:
                nonlocal keys
                try:
                    keys = server.scan(PREFIX, walk)
                except ResponseError:
                    keys, walk.ended = [], True

            while not walk.ended and self._everywhere(look, [server]):
                yield [name for key in keys if (name := name_in(key)) is not None]

    def drop(self, names: Sequence[BlockHash]) -> None:
        self._whether(names, lambda i: ("UNLINK", key_of(names[i])))

    def stats(self) -> StoreStats:
        """Asks the servers that can be reached; their blocks are all keys of their databases, and their evictions those
        since they were first asked."""
        told: list[ServerFacts] = []

        def ask(server: Server) -> None:
            # Servers for hire do not tell everyone, which is no reason to do without them.
            with suppress(ResponseError):
                told.append(facts := server.facts())
                self._tally.evicted(max(facts.evictions - self._evicted.get(server.label, facts.evictions), 0))
                self._evicted[server.label] = facts.evictions

        self._everywhere(ask)
        facts = list(told)
        bounded = bool(facts) and all(each.capacity_bytes for each in facts)
        return self._tally.stats(
            blocks=sum(each.keys for each in facts),
            size=sum(each.bytes for each in facts),
            capacity=sum(each.capacity_bytes for each in facts) if bounded else None,
        )

    def check_integrity(self) -> list[str]:
        """Nothing: the servers keep the accounts."""
        return []

    def clear(self) -> None:
        walks = {label: Walk() for label in self._servers}

        def clear_some(server: Server) -> None:
            server.unlink_some(PREFIX, walks[server.label])

        remaining = list(self._servers.values())
        while remaining:
            done = self._everywhere(clear_some, remaining)
            remaining = [server for server in done if not walks[server.label].ended]

    def close(self) -> None:
        self._closed = True
        for server in self._servers.values():
            server.close()

    def _learn_size(self, size: int) -> None:
        if size:
            self._typical_bytes = size

    def _search(
        self,
        names: Sequence[BlockHash],
        command: Callable[[int], Command],
        take: Take,
        found: Callable[[int], bool],
        size: int = 1,
    ) -> None:
        """Ask each one's server for `names`, and the next one for what it lacks and may have been put there."""
        doubted, present, left = self._standing.doubted(), self._present(), list(range(len(names)))
        passed: dict[int, set[str]] = {}
        while left:
            parts = self._each(names, left, passed, present, command, take, size)
            left = []
            for part in parts:
                for index in part.places if part.server in doubted else ():
                    tried = passed.setdefault(index, set())
                    tried.add(part.server)
                    if not found(index) and not tried >= present:
                        left.append(index)

    def _each(
        self,
        names: Sequence[BlockHash],
        places: Sequence[int],
        passed: Mapping[int, AbstractSet[str]],
        present: AbstractSet[str],
        command: Callable[[int], Command],
        take: Take,
        size: int,
    ) -> list[_Part]:
        """Send the command of each of `places` in `names`, about `size` bytes with its reply, to the first server that
        is `present` (any, if none is) and not `passed` there, of which there is one; count senseless answers."""
        keys = min(_MOST_KEYS, max(1, _ROUND_BYTES // size))
        gone = self._servers.keys() - present if present else frozenset()
        parts: list[tuple[_Part, Job | None, list[int]]] = []
        for label, group in self._ring.group(names, places, gone, passed).items():
            part, server = _Part(label, group), self._servers[label]
            rounds = [group[start : start + keys] for start in range(0, len(group), keys)]
            job = server.gate.start([partial(self._round, server, part, each, command, take) for each in rounds])
            parts.append((part, job, [len(each) for each in rounds]))
        for part, job, sizes in parts:
            part.done = self._finish(self._servers[part.server], job, sizes)
        return [part for part, _, _ in parts]

    def _present(self) -> set[str]:
        """The servers that are not spared now."""
        present = {label for label, server in self._servers.items() if server.gate.is_open()}
        for label in self._servers.keys() - present:
            self._standing.away(label)
        return present

    def _everywhere(self, work: Callable[[Server], None], servers: Sequence[Server] | None = None) -> list[Server]:
        """Do something on all servers at once; returns those where it was done."""
        chosen = list(self._servers.values()) if servers is None else servers
        jobs = [(server, server.gate.start([partial(work, server)])) for server in chosen]
        return [server for server, job in jobs if self._finish(server, job, [0])]

    def _round(
        self, server: Server, part: _Part, places: list[int], command: Callable[[int], Command], take: Take
    ) -> None:
        for index, reply in zip(places, server.pipeline([command(index) for index in places]), strict=True):
            if isinstance(reply, Exception):
                self._tally.failed(fault_of(reply))
                part.refused.append(index)
                part.refusal = reply
            elif not take(index, reply):
                self._tally.failed(Fault.BROKEN)

    def _finish(self, server: Server, job: Job | None, sizes: Sequence[int]) -> bool:
        """Wait for the rounds of a server, of `sizes` blocks each, and count those not done; whether all were."""
        if job is None:
            self._tally.failed(Fault.CLOSED if self._closed else Fault.SKIPPED, sum(sizes))
            return False
        if fault := server.gate.finish(job):
            self._tally.failed(
                fault, max(1, sum(sizes[job.completed :]))
            )  # a server that is gone shows, asked for blocks or not
            return False
        return True


def key_of(name: BlockHash) -> bytes:
    """The key that a block has on its server."""
    return PREFIX + name.hex().encode()


def name_in(key: bytes) -> BlockHash | None:
    """The block that has this key; None for a key that no block has."""
    match = _KEY.fullmatch(key)
    return None if match is None else BlockHash(bytes.fromhex(match[1].decode()))
