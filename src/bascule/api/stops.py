"""Finds stop strings in text that comes in pieces, and holds back what might be the beginning of one."""

from __future__ import annotations

from msgspec import Struct


class Scan(Struct, frozen=True):
    """What a piece of text has settled: `text` may be shown; `stopped` if a stop string is complete."""

    text: str
    stopped: bool = False


class StopScanner:
    """Scans one output. What it has released never contains the beginning of a stop string that follows.

    Example with the stop `END`: push("the E") releases "the ", push("N") releases "", push("T") releases "ENT".
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> Scan:
        """Take the next text; the earliest complete stop string cuts it (and is kept only with `include_stop`)."""
        window = self._held + text
        found = [(start, stop) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            start, stop = min(found, key=lambda match: match[0])
            self._held = ""
            return Scan(window[: start + len(stop) if self._include_stop else start], stopped=True)
        begun = max((_overlap(window, stop) for stop in self._stops), default=0)
        shown = len(window) - begun
        self._held = window[shown:]
        return Scan(window[:shown])

    def flush(self) -> str:
        """The output has ended: what was held is text after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` as a whole excluded."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
