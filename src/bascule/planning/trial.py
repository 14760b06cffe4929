"""Candidates tried in the simulator: the same requests for all, each combination simulated once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from bascule.planning.candidates import Candidate
from bascule.planning.demand import Demand
from bascule.planning.fluid import Links
from bascule.sim.cluster import Cluster, Overheads, Pool
from bascule.sim.figures import outcome_figures
from bascule.sim.run import Simulation
from bascule.types import Slo

_LEAST, _MOST = 80, 360
_SECONDS = 30.0
_PER_CLIENT = 4
"""Requests of a simulation: so many seconds of arrivals, or so many of each client, within the first two."""
_EACH = 2
"""Every client of a closed loop has so many at the least: with fewer, it would be a burst."""
_OVERHEADS = Overheads(step_s=0.0, stream_s=0.0)
"""Those of a step are in the classes' own costs: catalogue ones were fitted with them."""
Heard = Callable[[str], None]
"""Told of each simulation before it is run."""


class Setting(Struct, frozen=True, kw_only=True):
    """What all candidates are tried under."""

    demand: Demand
    slo: Slo
    links: Links
    requests: int = 0
    """Of each simulation; 0 for as many as the load asks for."""

    @property
    def count(self) -> int:
        if self.requests:
            return self.requests
        demand = self.demand
        wanted = _PER_CLIENT * demand.clients if demand.clients is not None else _SECONDS * (demand.rate or 0.0)
        return max(int(min(max(wanted, _LEAST), _MOST)), self.least)

    @property
    def least(self) -> int:
        """Fewer requests would not be this load."""
        return _EACH * (self.demand.clients or 0)

    def cluster(self, candidate: Candidate) -> Cluster:
        """As the simulator takes it."""
        return Cluster(
            policy=candidate.architecture,
            pools=tuple(
                Pool(share.role, share.of.kind, share.count, share.of.devices, share.of.hardware)
                for share in candidate.shares
            ),
            slo=self.slo,
            block_tokens=self.demand.block_tokens,
            kv_token_bytes=candidate.shares[0].of.kv_token_bytes,
            machine_workers=self.links.machine_devices,
            link_bytes_per_s=self.links.between,
            local_bytes_per_s=self.links.within,
            overheads=_OVERHEADS,
        )


class Result(Struct, frozen=True):
    """A candidate's simulations, one a seed, in the order of the seeds."""

    candidate: Candidate
    runs: tuple[dict[str, Any], ...]

    def each(self, *path: str) -> list[float]:
        """A figure of each run, by its keys; runs that have none are left out."""
        found = []
        for run in self.runs:
            value: Any = run
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                found.append(float(value))
        return found

    def mean(self, *path: str) -> float:
        """Over the runs; NaN where none has it."""
        values = self.each(*path)
        return statistics.fmean(values) if values else float("nan")

    @property
    def goodput(self) -> float:
        """Requests/s within the SLO."""
        return self.mean("goodput_per_s")

    @property
    def met(self) -> float:
        """Share of requests within the SLO."""
        return self.mean("slo_met")

    def missed(self) -> dict[str, float]:
        """Share of requests by the first thing that they missed."""
        names = self.runs[0]["slo_missed"]
        total = self.mean("requests")
        return {name: self.mean("slo_missed", name) / total for name in names}

    @property
    def busy(self) -> dict[str, float]:
        """Share of the time in which steps ran, by role."""
        return {role: self.mean("busy", role) for role in self.runs[0]["busy"]}


class Trials:
    """Simulations, kept by what they were of."""

    def __init__(self, heard: Heard = lambda _: None) -> None:
        self.requests = 0
        """Simulated."""
        self.simulations = 0
        self._heard = heard
        self._found: dict[tuple[Candidate, Setting, int], dict[str, Any]] = {}

    def results(
        self, candidates: Sequence[Candidate], setting: Setting, seeds: Sequence[int], why: str
    ) -> list[Result]:
        """Of each, in their order."""
        return [self.result(candidate, setting, seeds, why) for candidate in candidates]

    def result(self, candidate: Candidate, setting: Setting, seeds: Sequence[int], why: str) -> Result:
        return Result(candidate, tuple(self._run(candidate, setting, seed, why) for seed in seeds))

    def _run(self, candidate: Candidate, setting: Setting, seed: int, why: str) -> dict[str, Any]:
        key = (candidate, setting, seed)
        if key not in self._found:
            self._heard(why)
            talks = setting.demand.talks(setting.count, seed)
            outcome = Simulation(setting.cluster(candidate)).offer(talks, setting.demand.clients)
            if outcome.violations:
                raise RuntimeError(f"the books do not add up after a simulation: {outcome.violations[:3]}")
            self._found[key] = outcome_figures(outcome, setting.slo)
            self.requests += setting.count
            self.simulations += 1
        return self._found[key]
