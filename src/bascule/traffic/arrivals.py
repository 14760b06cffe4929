"""When requests come, if nobody has recorded it: Poisson, or in bursts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from bascule.errors import ConfigError


class Arrivals(Struct, frozen=True):
    """Gaps that are drawn one by one: exponential at a burstiness of 1, else from a Gamma distribution.

    With `off_s`, requests come for `on_s` seconds and then for `off_s` none do, in turns; the rate over both stays.
    """

    rate: float
    """Requests/s, on average."""
    burstiness: float = 1.0
    """Coefficient of variation of the gaps; above 1 requests come in clusters, near 0 as by the clock."""
    on_s: float = 1.0
    off_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("a rate", self.rate, "requests/s above 0"),
            ("a burstiness", self.burstiness, "a coefficient of variation above 0; 1 is Poisson"),
            ("a time with requests", self.on_s, "seconds above 0"),
        ):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} of {value:g} is not possible; give {least}")
        if not (self.off_s >= 0 and math.isfinite(self.off_s)):
            raise ConfigError(f"a time without requests of {self.off_s:g} is not possible; give seconds from 0 on")

    def slower(self, factor: float) -> Arrivals:
        """The same, so many times as rare."""
        return replace(self, rate=self.rate / factor)

    def times(self, rng: Random) -> Iterator[float]:
        """Seconds from the start at which requests come, without end."""
        within = self.rate * (self.on_s + self.off_s) / self.on_s
        shape = self.burstiness**-2
        at = 0.0
        while True:
            at += rng.expovariate(within) if self.burstiness == 1.0 else rng.gammavariate(shape, 1 / (shape * within))
            yield at + self.off_s * (at // self.on_s)
