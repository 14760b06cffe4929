"""A cluster in columns for policies to decide over, made from a few words a worker."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from bascule.policies.cost import PrefillPart, step_seconds
from bascule.policies.snapshot import RouteQuery, Snapshot
from bascule.router.columns import Columns
from bascule.types import CostModel, LinkCost, RequestId, Role, Slo, StepLoad, WorkerId

COST = CostModel(step_s=0.008, token_s=0.0008, pair_s=1e-7, context_s=5e-7, stream_s=(0.006, 0.007, 0.01, 0.016, 0.03))
FAST = CostModel(step_s=0.004, token_s=5e-5, pair_s=1e-9, context_s=2e-8, stream_s=(0.004, 0.0042, 0.005, 0.006))
BENT = CostModel(step_s=0.001, token_s=0.0004, pair_s=1e-8, context_s=1e-6, stream_s=(0.01, 0.004, 0.012, 0.013, 0.05))
TIGHT = Slo(0.5, 0.02, 0.05)
STANDARD = Slo(2.0, 0.06, 0.2)


class Cluster:
    """Workers one by one, with prompts (tokens to compute) and streams (tokens of context) on them."""

    def __init__(self, window_tokens: int = 4096) -> None:
        self.columns = Columns(2)
        self.links: dict[tuple[WorkerId, WorkerId], LinkCost] = {}
        self.cached: dict[int, int] = {}
        self.now = 0.0
        self._window = window_tokens
        self._rows = 0

    def add(
        self,
        name: str,
        role: Role = Role.MIXED,
        *,
        prompts: tuple[int, ...] = (),
        streams: tuple[int, ...] = (),
        cached: int = 0,
        slots: int = 64,
        kv_tokens: int = 40_000,
        machine: int = 0,
        hands_off: bool = True,
        placeable: bool = True,
        cost: CostModel = COST,
        chunk_tokens: int = 512,
        slack_s: float | None = None,
    ) -> int:
        """Returns the worker's row."""
        row, columns = self._rows, self.columns
        self._rows += 1
        columns.add(
            row,
            WorkerId(name),
            role,
            slots=slots,
            kv_tokens=kv_tokens,
            machine=machine,
            hands_off=hands_off,
            chunk_tokens=chunk_tokens,
        )
        columns.cost.put(row, cost)
        columns.placeable[row] = placeable
        for tokens in prompts:
            columns.submitted(row, tokens, step_seconds(cost, [PrefillPart(tokens, 0)], 0, 0), self.now)
            columns.decoding[row] += 1
        for tokens in streams:
            columns.decoding[row] += 1
            columns.context_tokens[row] += tokens
        columns.report(row, StepLoad(0, len(prompts), sum(prompts), len(streams), sum(streams), slack_s))
        self.cached[row] = cached
        return row

    def snapshot(self, turn: int = 0) -> Snapshot:
        return self.columns.snapshot(self.now, turn, self.links, self._window)

    def query(self, tokens: int = 100, **changes: Any) -> RouteQuery:
        cached = np.zeros(len(self.columns.ids), np.int64)
        for row, count in self.cached.items():
            cached[row] = min(count, tokens - 1)
        values: dict[str, Any] = {
            "request": RequestId("r"),
            "prompt_tokens": tokens,
            "max_tokens": 100,
            "output_tokens": 50.0,
            "cached": cached,
            "kv_token_bytes": 23_040,
        }
        return RouteQuery(**(values | changes))


workers = st.fixed_dictionaries(
    {
        "role": st.sampled_from(list(Role)),
        "prompts": st.lists(st.integers(1, 3000), max_size=3).map(tuple),
        "streams": st.lists(st.integers(1, 2000), max_size=12).map(tuple),
        "cached": st.sampled_from([0, 0, 64, 400, 2000]),
        "slots": st.sampled_from([4, 64]),
        "kv_tokens": st.sampled_from([500, 40_000]),
        "machine": st.integers(0, 1),
        "hands_off": st.sampled_from([True, True, False]),
        "placeable": st.sampled_from([True, True, True, False]),
        "cost": st.sampled_from([COST, FAST, BENT, CostModel()]),
        "slack_s": st.sampled_from([None, 0.0, 0.3]),
    }
)
clusters = st.lists(workers, min_size=1, max_size=6)
queries = st.fixed_dictionaries(
    {
        "tokens": st.integers(2, 5000),
        "slo": st.sampled_from([Slo(), STANDARD, TIGHT]),
        "gap_planned_s": st.sampled_from([0.05, 0.2, math.inf]),
        "tpot_planned_s": st.sampled_from([0.015, 0.06, math.inf]),
        "output_tokens": st.sampled_from([1.0, 50.0, 400.0]),
        "waited_s": st.sampled_from([0.0, 0.7]),
    }
)
Wish = dict[str, Any]


def built(wishes: list[Wish]) -> Cluster:
    cluster = Cluster()
    for number, wish in enumerate(wishes):
        cluster.add(f"w{number}", **wish)
    return cluster
