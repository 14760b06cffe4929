"""Classes of workers and questions for the tests of the planner: small enough to be answered in a blink."""

from __future__ import annotations

from typing import Any

from bascule.hardware import ClassFile
from bascule.planning.candidates import Budget
from bascule.planning.classes import WorkerClass, measured_class
from bascule.planning.demand import Demand, demand_of
from bascule.planning.fluid import Links
from bascule.planning.search import Ask
from bascule.planning.trial import Setting
from bascule.sim.classes import Memory
from bascule.types import CostModel, Slo

COST = CostModel(step_s=0.002, token_s=0.0002, pair_s=2e-8, context_s=1e-7, stream_s=(0.006, 0.007, 0.009, 0.012))
LINKS = Links(between=1e10, within=4e9, machine_devices=8)
SLO = Slo(1.0, 0.03, 0.1)
KV_TOKEN_BYTES = 20_000


def a_class(name: str = "core", cost: CostModel = COST, devices: int = 1, price: float | None = 1.0) -> WorkerClass:
    told = ClassFile(cost=cost, price_per_hour=price)
    return measured_class(name, devices, told, Memory(kv_bytes=1 << 30, kv_token_bytes=KV_TOKEN_BYTES))


def demand(workload: str = "mixed", *, rate: float | None = None, clients: int | None = None) -> Demand:
    return demand_of(workload, None, rate, clients)


def an_ask(
    asked: Demand, *classes: WorkerClass, slo: Slo = SLO, links: Links = LINKS, requests: int = 40, **more: Any
) -> Ask:
    """Of one class and up to four devices, unless it says otherwise; two seeds."""
    setting = Setting(demand=asked, slo=slo, links=links, requests=requests)
    given: dict[str, Any] = {"budget": Budget(devices=4), "seeds": (1, 2), **more}
    return Ask(classes=classes or (a_class(),), setting=setting, **given)
