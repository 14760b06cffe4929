"""Which of several servers keeps a block: consistent hashing, so that most blocks stay when servers come and go."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import xxhash

from bascule.types import BlockHash

_VIRTUAL_NODES = 512
"""Per server; the shares of a few servers then differ by some 5 %."""


class Ring:
    """Points on a circle of 64-bit numbers, `virtual_nodes` for each server; a block belongs to the next point.

    Where servers are gone, it belongs to the next point of one that is not: what the others keep stays where it is.
    """

    def __init__(self, servers: Sequence[str], virtual_nodes: int = _VIRTUAL_NODES) -> None:
        """`servers` by the names that they keep for life; raises ValueError if there is none, or two of one name."""
        if not servers or len(set(servers)) != len(servers):
            raise ValueError(f"a ring needs at least one server and no two of one name, not {list(servers)}")
        points = sorted(
            (xxhash.xxh3_64_intdigest(f"{server}#{node}".encode()), server)
            for server in servers
            for node in range(virtual_nodes)
        )
        self._points = [point for point, _ in points]
        self._servers = [server for _, server in points]

    def owner(self, name: BlockHash, gone: Collection[str] = ()) -> str:
        """The server that keeps the block while those of `gone` do not; at least one has to be left."""
        place = bisect(self._points, xxhash.xxh3_64_intdigest(name)) % len(self._servers)
        while (server := self._servers[place]) in gone:
            place = (place + 1) % len(self._servers)
        return server

    def group(
        self,
        names: Sequence[BlockHash],
        places: Iterable[int],
        gone: AbstractSet[str] = frozenset(),
        passed: Mapping[int, AbstractSet[str]] = MappingProxyType({}),
    ) -> dict[str, list[int]]:
        """For each server that keeps any of the `places` in `names` these places, in order, while those of `gone` keep
        nothing, nor those of `passed` what is at that place."""
        groups: dict[str, list[int]] = {}
        for place in places:
            avoided = gone | passed[place] if place in passed else gone
            groups.setdefault(self.owner(names[place], avoided), []).append(place)
        return groups
