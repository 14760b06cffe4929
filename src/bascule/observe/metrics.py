"""What Prometheus reads: counts and latencies of requests, and the workers' books at the time of the scrape."""

from __future__ import annotations

from collections import Counter as Sums
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bascule.clock import Clock
from bascule.observe.state import ClusterState, RoutingFigures
from bascule.observe.totals import COUNTERS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
_GAP_BUCKETS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.06,
    0.08,
    0.1,
    0.12,
    0.15,
    0.2,
    0.35,
    0.5,
    1.0,
    5.0,
)


class Outcome(StrEnum):
    """How an HTTP request for tokens ended."""

    COMPLETED = "completed"
    INVALID = "invalid"
    """Refused for what it asked (4xx)."""
    REJECTED = "rejected"
    """Refused for want of room (429)."""
    CANCELLED = "cancelled"
    """The client went away."""
    TIMEOUT = "timeout"
    FAILED = "failed"


class Metrics:
    """The metrics of one router, in a registry of their own."""

    def __init__(self, state: Callable[[], ClusterState], clock: Clock) -> None:
        """`state` is read once a scrape; `clock` times the outputs."""
        self.registry = CollectorRegistry()
        self._clock = clock
        requests = Counter(
            "bascule_requests", "HTTP requests for tokens, by outcome", ["outcome"], registry=self.registry
        )
        self._requests = {outcome: requests.labels(outcome.value) for outcome in Outcome}
        self._ttft = self._histogram(
            "time_to_first_token", "From receiving a request to its first token", _TTFT_BUCKETS
        )
        self._tpot = self._histogram("time_per_output_token", "Mean gap between an output's tokens", _GAP_BUCKETS)
        self._itl = self._histogram(
            "inter_token_latency", "Gap between an output's successive deliveries", _GAP_BUCKETS
        )
        self.registry.register(_ClusterCollector(state))

    def ended(self, outcome: Outcome) -> None:
        """Count one HTTP request."""
        self._requests[outcome].inc()

    def timer(self, received: float) -> OutputTimer:
        """Times one output of a request that was received at `received` (the clock's seconds)."""
        return OutputTimer(self._clock, received, self._ttft, self._tpot, self._itl)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"bascule_{name}_seconds", f"{text} (s)", buckets=buckets, registry=self.registry)


class OutputTimer:
    """Observes the latencies of one output as its tokens come."""

    def __init__(self, clock: Clock, received: float, ttft: Histogram, tpot: Histogram, itl: Histogram) -> None:
        self._clock = clock
        self._received = received
        self._ttft = ttft
        self._tpot = tpot
        self._itl = itl
        self._first: float | None = None
        self._latest = received

    def delivered(self) -> None:
        """One or more tokens have come."""
        now = self._clock.now()
        if self._first is None:
            self._first = now
            self._ttft.observe(now - self._received)
        else:
            self._itl.observe(now - self._latest)
        self._latest = now

    def ended(self, tokens: int) -> None:
        """The output is complete with `tokens` tokens."""
        if self._first is not None and tokens > 1:
            self._tpot.observe((self._latest - self._first) / (tokens - 1))


class _ClusterCollector(Collector):
    """Reads the cluster's state when scraped, so that its figures are never older than the workers' heartbeats."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        """Nothing, which spares the registry a first scrape before there is a cluster."""
        return []

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield GaugeMetricFamily("bascule_requests_queued", "Requests that wait at the router", state.queued)
        yield GaugeMetricFamily("bascule_requests_active", "Requests placed and not ended", state.active)
        yield _workers(state)
        yield _blocks(state)
        yield _sequences(state)
        yield GaugeMetricFamily(
            "bascule_integrity_violations",
            "Violations of the KV books, the store tiers' accounts and the router's prefix index (must be 0)",
            state.integrity_violations,
        )
        yield from _totals(state)
        yield _store_blocks(state)
        yield CounterMetricFamily(
            "bascule_store_handoffs", "Requests handed over by way of the KV store", state.store_handoffs
        )
        yield _counted("bascule_retries", "Requests placed again", "cause", state.retries)
        yield _counted("bascule_worker_rests", "Times that a failing worker was left alone", "worker", state.rests)
        yield _prediction_errors(state)
        yield from _routing(state.routing)
        yield _counted("bascule_kv_event_faults", "Reports of KV that were lost or not usable", "kind", state.kv_faults)


def _totals(state: ClusterState) -> Iterator[Metric]:
    """What workers have counted: handoffs, hits, what the tiers of the store and fetches have done."""
    for name, (text, labels) in COUNTERS.items():
        family = CounterMetricFamily(name, text, labels=labels)
        for key, total in state.totals.items():
            if key[0] == name:
                family.add_metric(key[1:], total)
        yield family


def _prediction_errors(state: ClusterState) -> Metric:
    """By what was predicted; a term that nothing is known of yet has no value."""
    family = GaugeMetricFamily(
        "bascule_prediction_error_ratio", "Median of |predicted - actual| / actual, lately", labels=["term"]
    )
    steps = [worker.load.cost_error for worker in state.workers if worker.load.cost_error is not None]
    for term, error in (state.routing.errors | ({"step": median(steps)} if steps else {})).items():
        family.add_metric([term], error)
    return family


def _routing(figures: RoutingFigures) -> Iterator[Metric]:
    """What the router has decided."""
    yield _counted("bascule_decisions", "Placements of requests", "kind", figures.decisions)
    yield _counted("bascule_rejected", "Requests answered 429", "reason", figures.rejected)
    yield CounterMetricFamily(
        "bascule_policy_failures", "Decisions that a plug-in policy failed to make", figures.policy_failures
    )
    yield CounterMetricFamily(
        "bascule_decision_log_lost", "Requests that could not be written to the decision log", figures.log_lost
    )


def _blocks(state: ClusterState) -> Metric:
    """KV blocks by worker and state; the states add up to the worker's total."""
    family = GaugeMetricFamily("bascule_kv_blocks", "KV blocks", labels=["worker", "state"])
    for worker in state.workers:
        load = worker.load
        used = load.kv_blocks_leased + load.kv_blocks_cached + load.kv_blocks_quarantined
        family.add_metric([worker.id, "leased"], load.kv_blocks_leased)
        family.add_metric([worker.id, "cached"], load.kv_blocks_cached)
        family.add_metric([worker.id, "quarantined"], load.kv_blocks_quarantined)
        family.add_metric([worker.id, "free"], load.kv_blocks_total - used)
    return family


def _store_blocks(state: ClusterState) -> Metric:
    family = GaugeMetricFamily("bascule_kv_store_blocks", "Blocks that a tier holds", labels=["tier"])
    for tier, blocks in state.store_blocks.items():
        family.add_metric([tier], blocks)
    return family


def _workers(state: ClusterState) -> Metric:
    family = GaugeMetricFamily("bascule_workers", "Members of the cluster", labels=["state"])
    states = Sums(worker.state for worker in state.workers)
    for name in ("ready", "suspect", "draining", "drained"):
        family.add_metric([name], states[name])
    return family


def _sequences(state: ClusterState) -> Metric:
    family = GaugeMetricFamily("bascule_sequences", "Sequences in the engines", labels=["worker", "state"])
    for worker in state.workers:
        family.add_metric([worker.id, "running"], worker.load.running)
        family.add_metric([worker.id, "waiting"], worker.load.waiting)
    return family


def _counted(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
