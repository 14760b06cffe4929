"""Transfers in flight: those that cross the same link at the same time share its bandwidth.

A machine has a link outwards and one inwards; what stays within a machine goes through its memory. A transfer gets the
smallest of its equal shares of the links that it crosses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bascule.sim.agenda import Agenda


class Flow:
    """One transfer."""

    __slots__ = ("at", "done", "left", "links", "rate", "version")

    def __init__(self, size: float, links: tuple[Link, ...], now: float, done: Callable[[], None]) -> None:
        self.left = size
        self.links = links
        self.at = now
        self.done = done
        self.rate = 0.0
        self.version = 0


class Link:
    """What is shared."""

    __slots__ = ("bytes_per_s", "flows")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.flows: dict[Flow, None] = {}


class Network:
    """The links of all machines."""

    def __init__(self, agenda: Agenda, bytes_per_s: float, local_bytes_per_s: float) -> None:
        """Of a machine's link to others, each way, and of handing over within a machine."""
        self._agenda = agenda
        self._bytes_per_s = bytes_per_s
        self._local_bytes_per_s = local_bytes_per_s
        self._links: dict[tuple[str, int], Link] = {}

    def send(self, source: int, target: int, size: float, done: Callable[[], None]) -> Flow:
        """Begin to move `size` bytes from one machine to another, or within one; `done` is called at the end."""
        if source == target:
            links: tuple[Link, ...] = (self._link("within", source, self._local_bytes_per_s),)
        else:
            links = (
                self._link("out", source, self._bytes_per_s),
                self._link("in", target, self._bytes_per_s),
            )
        flow = Flow(size, links, self._agenda.now(), done)
        for link in links:
            link.flows[flow] = None
        self._share_out(links)
        return flow

    def stop(self, flow: Flow) -> None:
        """It is no longer wanted; does nothing for one that has ended."""
        flow.version += 1
        for link in flow.links:
            link.flows.pop(flow, None)
        self._share_out(flow.links)

    def _link(self, way: str, machine: int, bytes_per_s: float) -> Link:
        link = self._links.get((way, machine))
        if link is None:
            link = self._links[way, machine] = Link(bytes_per_s)
        return link

    def _share_out(self, links: tuple[Link, ...]) -> None:
        """The number of transfers over these links has changed."""
        now = self._agenda.now()
        for flow in {flow: None for link in links for flow in link.flows}:
            rate = min(link.bytes_per_s / len(link.flows) for link in flow.links)
            if rate != flow.rate:
                flow.left -= (now - flow.at) * flow.rate
                flow.at, flow.rate = now, rate
                flow.version += 1
                self._agenda.after(max(flow.left, 0.0) / rate, partial(self._arrived, flow, flow.version))

    def _arrived(self, flow: Flow, version: int) -> None:
        if version == flow.version:
            self.stop(flow)
            flow.done()
