"""What a candidate could carry at most, by its cost models alone: nobody waits, no worker idles, caches never end."""

from __future__ import annotations

import math
from functools import partial

from msgspec import Struct

from bascule.planning.candidates import Candidate
from bascule.planning.classes import WorkerClass
from bascule.planning.demand import Demand
from bascule.policies.cost import decode_seconds
from bascule.policies.load import prompt_seconds
from bascule.sim.offered import full_step_share
from bascule.types import Slo

_SLACK = 0.1
"""By which a bound may be missed alone before nobody is asked whether it is kept: caches and chunks help."""


class Links(Struct, frozen=True, kw_only=True):
    """Bytes per second, and how many devices a machine has."""

    between: float
    within: float
    machine_devices: int

    def times(self, factor: float) -> Links:
        """Both as many times as fast."""
        return Links(between=self.between * factor, within=self.within * factor, machine_devices=self.machine_devices)


class Work(Struct, frozen=True, kw_only=True):
    """What a request of the demand takes of one worker of a class, on average."""

    prefill_s: float
    """Of its prompt, alone, what is in caches left out."""
    decode_s: float
    """Its share of steps of streams alone, as full as the bound on TPOT and the memory allow."""
    beside_s: float
    """The same where prompts fill the steps anyway, if that is less."""
    in_time: float
    """Share of prompts that are computed within the bound on TTFT if nobody is before them."""
    streams_in_time: bool
    """A single stream keeps the bound on TPOT."""
    alone_s: float
    """A whole request, with the worker to itself."""


class Fluid(Struct, frozen=True, kw_only=True):
    """Bounds of one candidate."""

    capacity: float
    """Requests/s."""
    offered: float
    """Requests/s; at most, in a closed loop."""
    in_time: float
    patience: float
    """How many times longer than alone a request may take within the SLO; infinity where there is no bound."""
    open_loop: bool
    bound_by: str
    """`prefill`, `decode`, `network` or `workers`: what is used up first."""

    @property
    def goodput(self) -> float:
        """Requests/s within the SLO, at most."""
        return min(self.capacity, self.offered) * self.in_time

    @property
    def headroom(self) -> float:
        return self.capacity / max(self.offered, 1e-12)

    def may_keep(self, attainment: float) -> bool:
        """Whether so large a share within the SLO is not out of the question."""
        lasting = self.headroom >= 1 if self.open_loop else self.headroom * self.patience >= 1 - _SLACK
        return lasting and self.in_time >= attainment - _SLACK


class Scale:
    """Bounds of candidates under one demand; what a class does is worked out once."""

    def __init__(self, demand: Demand, slo: Slo, links: Links) -> None:
        self.demand = demand
        self.links = links
        self.slo = slo
        self._work: dict[tuple[str, float], Work] = {}

    def work(self, one: WorkerClass) -> Work:
        key = (one.name, one.kind.cost.token_s)
        if key not in self._work:
            self._work[key] = self._worked_out(one)
        return self._work[key]

    def of(self, candidate: Candidate) -> Fluid:
        """Its bounds."""
        first, last = candidate.shares[0], candidate.shares[-1]
        before, after = self.work(first.of), self.work(last.of)
        alone = before.prefill_s + max(after.alone_s - after.prefill_s, 0.0)
        demand = self.demand
        offered = demand.rate if demand.rate is not None else (demand.clients or 1) / max(alone, 1e-9)
        in_time = before.in_time if after.streams_in_time else 0.0
        patience = (self.slo.ttft_s + demand.output_tokens * self.slo.tpot_s) / max(alone, 1e-9)
        bound = partial(Fluid, offered=offered, patience=patience, open_loop=demand.rate is not None)
        if len(candidate.shares) == 1:
            capacity = first.count / (before.prefill_s + before.beside_s)
            return bound(capacity=capacity, in_time=in_time, bound_by="workers")
        bounds = {"prefill": first.count / before.prefill_s, "decode": last.count / after.decode_s}
        if candidate.architecture == "disaggregated":
            bounds["network"] = self._transfers(candidate)
        elif bounds["prefill"] < bounds["decode"]:
            # Workers of the other pool compute what the first does not get done.
            spare = first.count * after.prefill_s / before.prefill_s
            bounds = {"workers": (last.count + spare) / (after.beside_s + after.prefill_s)}
            in_time = max(in_time, after.in_time)
        name = min(bounds, key=lambda bound: bounds[bound])
        return bound(capacity=bounds[name], in_time=in_time, bound_by=name)

    def handed_bytes(self, candidate: Candidate) -> float:
        """KV of a request that crosses a link, on average."""
        return self.demand.new_tokens * candidate.shares[0].of.kv_token_bytes

    def on_one_machine(self, candidate: Candidate) -> bool:
        one_kind = len({share.of.hardware for share in candidate.shares}) == 1
        return one_kind and candidate.devices <= self.links.machine_devices

    def _transfers(self, candidate: Candidate) -> float:
        """Requests/s that the links carry."""
        size = max(self.handed_bytes(candidate), 1.0)
        if self.on_one_machine(candidate):
            return self.links.within / size
        machines = min(
            math.ceil(share.count * share.of.devices / self.links.machine_devices) for share in candidate.shares
        )
        return machines * self.links.between / size

    def _worked_out(self, one: WorkerClass) -> Work:
        rows, cost, chunk = self.demand.rows, one.kind.cost, one.kind.chunk_tokens
        prefill = [prompt_seconds(cost, row.prompt, int(row.cached), chunk) for row in rows]
        first_s = decode_seconds(cost, 1, 0)
        context = self.demand.prompt_tokens + self.demand.output_tokens / 2
        mean = sum(prefill) / len(rows)
        output = self.demand.output_tokens
        alone = max(output * full_step_share(one.kind, context, self.slo.tpot_s), 1e-12)
        beside = output * (cost.token_s + cost.draw_s + cost.context_s * context)
        return Work(
            prefill_s=max(mean, 1e-12),
            decode_s=alone,
            beside_s=min(alone, beside),
            in_time=sum(seconds <= self.slo.ttft_s for seconds in prefill) / len(rows),
            streams_in_time=first_s <= self.slo.tpot_s,
            alone_s=mean + output * decode_seconds(cost, 1, int(context)),
        )
