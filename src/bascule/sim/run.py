"""One simulation from its first request to its last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from bascule.bench.load import Record, Run
from bascule.router.membership import TICK_S
from bascule.sim.agenda import Agenda
from bascule.sim.clients import Clients
from bascule.sim.cluster import Cluster
from bascule.sim.gaps import GapCounts
from bascule.sim.handoffs import Handoffs
from bascule.sim.network import Network
from bascule.sim.router import SimLink, SimRouter
from bascule.sim.tiers import TierPlace
from bascule.sim.worker import SimWorker
from bascule.traffic.workloads import Talk
from bascule.types import Role, Tier, WorkerId

_TOLD_EVERY = 1000
"""Events."""
Progress = Callable[[int], None]
"""Told now and then of how many requests have ended."""


class Outcome(Struct, frozen=True, kw_only=True):
    """What came of a simulation."""

    run: Run
    gaps: GapCounts
    busy: dict[str, float]
    """Share of the time in which a step ran, by role."""
    placed: dict[str, int]
    """Requests placed whole (`local`) and split (`remote`)."""
    handoffs: int
    kept: int
    """Handoffs for which no blocks were to be had in time."""
    handoff_bytes: float
    events: int
    violations: list[str]
    """What the books of all workers say of themselves at the end; must be empty."""


class Simulation:
    """A cluster on virtual time."""

    def __init__(self, cluster: Cluster) -> None:
        self.agenda = Agenda()
        self._cluster = cluster
        self._tier_places: dict[str, TierPlace] = {}
        overheads = cluster.overheads
        card = cluster.card()
        link = SimLink(self.agenda, overheads.submit_s)
        self.router = SimRouter(
            self.agenda,
            cluster.routing(),
            cluster.slo,
            link,
            lambda flight, error: self.clients.ended(flight, error),
        )
        self._times = overheads.clients
        self.clients = Clients(self.agenda, self.router, self._times)
        self.workers: dict[WorkerId, SimWorker] = {}
        for machine, (name, role, kind) in zip(cluster.machines(), cluster.members(), strict=True):
            timed = replace(kind, cost=overheads.of(kind.cost))
            limits = cluster.limits(kind)
            self.workers[WorkerId(name)] = SimWorker(
                WorkerId(name), role, timed, card, machine, self.agenda, self.router, limits, self._places(machine)
            )
        network = Network(self.agenda, cluster.link_bytes_per_s, cluster.local_bytes_per_s)
        self.handoffs = Handoffs(self.agenda, network, self.workers, card, overheads.handoffs, self.router.learnt)
        for worker in self.workers.values():
            link.workers[worker.epoch] = worker
            self.router.tell(worker.epoch, worker.offer())
        for death in cluster.deaths:
            self.agenda.at(death.at, partial(self._die, WorkerId(death.worker)))
        self.agenda.after(TICK_S, self._tick)

    def _places(self, machine: int) -> list[TierPlace]:
        """The tiers that a machine's workers have: those of the machine, and those of all."""
        found = []
        for plan in self._cluster.tiers:
            name = str(plan.tier) if plan.tier is Tier.REMOTE else f"{plan.tier}-{machine}"
            if name not in self._tier_places:
                self._tier_places[name] = TierPlace(plan, name, self._cluster.card())
            found.append(self._tier_places[name])
        return found

    def offer(self, talks: Iterable[Talk], concurrency: int | None, progress: Progress | None = None) -> Outcome:
        """As `bench.load.offer`: `concurrency` clients in a closed loop, or each talk at its own time.

        What has been offered before is remembered by the cluster: caches, and what the router has learnt.
        """
        clients = self.clients = Clients(self.agenda, self.router, self._times)
        if concurrency is None:
            clients.open_loop(iter(talks))
        else:
            clients.closed_loop(iter(talks), concurrency)

        def done() -> bool:
            if progress is not None and self.agenda.events % _TOLD_EVERY == 0:
                progress(len(clients.records))
            return clients.done

        self.agenda.run(done)
        return self._outcome()

    def _outcome(self) -> Outcome:
        run = _run_of(self.clients.records, self.agenda.now() - self.clients.begun)
        busy: dict[Role, list[float]] = {}
        for worker in self.workers.values():
            busy.setdefault(worker.role, []).append(worker.busy_s / self.agenda.now())
        return Outcome(
            run=run,
            gaps=self.router.gaps,
            busy={str(role): sum(shares) / len(shares) for role, shares in busy.items()},
            placed=self.router.service.state().routing.decisions,
            handoffs=self.handoffs.count,
            kept=self.handoffs.kept,
            handoff_bytes=self.handoffs.bytes,
            events=self.agenda.events,
            violations=[line for worker in self.workers.values() if worker.alive for line in worker.check_integrity()],
        )

    def _tick(self) -> None:
        self.router.tick()
        self.agenda.after(TICK_S, self._tick)

    def _die(self, name: WorkerId) -> None:
        worker = self.workers[name]
        worker.die()
        self.handoffs.worker_died(worker)
        self.router.lose(worker, "died")


def _run_of(records: list[Record], until: float) -> Run:
    """From the first request's start to the last token, as `bench.load` has it; to `until` where none came."""
    ends = [record.start + record.e2e for record in records if not record.error]
    wall = max(ends, default=until) - min((record.start for record in records), default=0.0)
    return Run(records=tuple(records), wall_s=max(wall, 1e-9))
