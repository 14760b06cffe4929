"""What is simulated: workers, links and settings; checked before anything runs."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
from msgspec import Struct

from bascule.config import RoutingConfig
from bascule.engine.core import EngineLimits
from bascule.errors import ConfigError
from bascule.router.policy import lacking
from bascule.sim.clients import ClientTimes
from bascule.sim.handoffs import HandoffTimes
from bascule.sim.tiers import TierPlan
from bascule.sim.worker import Kind
from bascule.types import CostModel, KVLayout, ModelCard, Role, Slo

_CONTEXT, _VOCAB = 1 << 20, 1 << 31


class Pool(Struct, frozen=True):
    """Equal workers of one role."""

    role: Role
    kind: Kind
    count: int
    devices: int = 1
    """That each takes of its machine."""
    hardware: str = ""
    """What its machines are made of; pools of other hardware have machines of their own."""


class Death(Struct, frozen=True):
    """A worker that dies, and is not replaced."""

    at: float
    worker: str


class Overheads(Struct, frozen=True, kw_only=True):
    """What live serving takes beside a model's steps.

    The defaults are those of mock workers on two cores that are theirs alone: what live serving takes more than
    `benchmarks/sim_parity.py --bare` says. A step is from TPOT with one client, a stream from TPOT with 32, the way to
    the router from TTFT with one client, a handoff from what workers report of their links.
    """

    clients: ClientTimes = ClientTimes()
    handoffs: HandoffTimes = HandoffTimes()
    submit_s: float = 0.001
    """From a decision until the worker's engine has the request."""
    step_s: float = 0.0008
    """More for each step: planning, bookkeeping, waking up."""
    stream_s: float = 0.00006
    """More for each stream in a step."""
    token_s: float = 0.0
    """More for each prompt token in a step."""

    def of(self, cost: CostModel) -> CostModel:
        """A cost model with them in it, as workers would have fitted it."""
        more = [self.step_s + self.stream_s * (1 << knot) for knot in range(len(cost.stream_s))]
        return msgspec.structs.replace(
            cost,
            step_s=cost.step_s + self.step_s,
            token_s=cost.token_s + self.token_s,
            draw_s=cost.draw_s + max(self.stream_s - self.token_s, 0.0),
            stream_s=tuple(own + other for own, other in zip(cost.stream_s, more, strict=True)),
        )


class Cluster(Struct, frozen=True, kw_only=True):
    """Everything that a simulation is of, traffic aside. Raises ConfigError for what cannot be."""

    policy: str
    pools: tuple[Pool, ...]
    slo: Slo = Slo(2.0, 0.06, 0.2)
    admission: Literal["queue", "slo"] = "queue"
    queue_limit: int = 1024
    block_tokens: int = 16
    kv_token_bytes: int = 23_040
    machine_workers: int = 8
    """Workers on one machine, where each takes one device of it."""
    link_bytes_per_s: float = 12.5e9
    """Between machines, each way; what is in flight shares it."""
    local_bytes_per_s: float = 4e9
    """Within a machine; shared likewise."""
    tiers: tuple[TierPlan, ...] = ()
    """Of the KV store, the fastest first."""
    deaths: tuple[Death, ...] = ()
    overheads: Overheads = Overheads()

    def __post_init__(self) -> None:
        if not sum(pool.count for pool in self.pools):
            raise ConfigError("there are no workers; give --mixed, or --prefill and --decode")
        roles = {pool.role for pool in self.pools if pool.count}
        if missing := lacking(self.policy, roles):
            raise ConfigError(missing)
        for name, value in (
            ("kv-token-bytes", self.kv_token_bytes),
            ("machine-workers", self.machine_workers),
            ("link", self.link_bytes_per_s),
            ("local-link", self.local_bytes_per_s),
            ("block-size", self.block_tokens),
        ):
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"--{name} is {value:g}; it must be above 0")
        for pool in self.pools:
            if pool.kind.kv_tokens < 2 * self.block_tokens:
                raise ConfigError(
                    f"class {pool.kind.name}: KV memory for {pool.kind.kv_tokens} tokens holds no two blocks of "
                    f"{self.block_tokens}; give it more"
                )
        for plan in self.tiers:
            if plan.capacity_bytes < 2 * self.block_tokens * self.kv_token_bytes:
                raise ConfigError(f"--kv-{plan.tier}: {plan.capacity_bytes} bytes hold no two blocks; give it more")
        names = self.worker_ids()
        for death in self.deaths:
            if death.worker not in names:
                raise ConfigError(
                    f"worker {death.worker} is to die, and is not there; there are {', '.join(names[:8])}"
                )

    def worker_ids(self) -> list[str]:
        """In the order of the pools, as `serve` names them."""
        return [name for name, _, _ in self.members()]

    def members(self) -> list[tuple[str, Role, Kind]]:
        """Each worker's id, role and class."""
        counts = dict.fromkeys(Role, 0)
        found = []
        for pool in self.pools:
            for _ in range(pool.count):
                found.append((f"{pool.role}-{counts[pool.role]}", pool.role, pool.kind))
                counts[pool.role] += 1
        return found

    def machines(self) -> list[int]:
        """The machine of each worker, in their order: a machine is filled before the next one is begun."""
        found: list[int] = []
        machine, taken, hardware = -1, self.machine_workers, None
        for pool in self.pools:
            for _ in range(pool.count):
                if pool.hardware != hardware or taken + pool.devices > self.machine_workers:
                    machine, taken, hardware = machine + 1, 0, pool.hardware
                taken += pool.devices
                found.append(machine)
        return found

    def card(self) -> ModelCard:
        """A model of which only the size of its KV is known."""
        layout = KVLayout("uint8", 1, 1, self.kv_token_bytes, self.block_tokens, 1, self.kv_token_bytes)
        return ModelCard(name="simulated", fingerprint="5" * 32, context=_CONTEXT, vocab=_VOCAB, layout=layout)

    def routing(self) -> RoutingConfig:
        """As a router has it."""
        return RoutingConfig(policy=self.policy, admission=self.admission, queue_limit=self.queue_limit)

    def limits(self, kind: Kind) -> EngineLimits:
        """As a worker has them."""
        return EngineLimits(
            max_sequences=kind.max_sequences,
            chunk_tokens=kind.chunk_tokens,
            step_tokens=max(kind.step_tokens, kind.max_sequences),
            slo=self.slo,
        )
