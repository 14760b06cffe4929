"""The cluster in columns, one row a worker: what policies read, kept up to date in place as requests come and go."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bascule.policies.cost import CostColumns, Floats
from bascule.policies.snapshot import CHUNK_TOKENS, ROLES, SIZES, Snapshot, StoreColumns, size_of
from bascule.types import CostModel, LinkCost, Role, StepLoad, WorkerId

SHARE_S = 10.0
"""Seconds over which the share of prompts in a worker's time is averaged."""


class Columns:
    """Rows are given out by the caller, the smallest free ones first; a row that is not in use is not placeable."""

    def __init__(self, rows: int = 8) -> None:
        self.ids: list[WorkerId] = []
        self._allocate(rows)
        self.unreached: dict[int, frozenset[int]] = {}
        """Rows that each row's worker cannot connect to; empty ones are left out."""
        self._unreceived: dict[int, deque[tuple[int, int]]] = {}
        """Submissions that a worker has not confirmed: (number, uncached tokens)."""
        self._sent: dict[int, int] = {}
        self._stale: set[int] = set()
        """Rows whose backlog is to be computed again."""

    def _allocate(self, rows: int) -> None:
        self.ids = [WorkerId("")] * rows
        self.role = np.zeros(rows, np.int8)
        self.placeable = np.zeros(rows, np.bool_)
        self.hands_off = np.zeros(rows, np.bool_)
        self.lends = np.zeros(rows, np.bool_)
        """Others may fetch KV from it."""
        self.slots = np.zeros(rows, np.int64)
        self.decoding = np.zeros(rows, np.int64)
        self.prefilling = np.zeros(rows)
        self.streams = np.zeros(rows)
        self.context_tokens = np.zeros(rows)
        self.kv_tokens = np.zeros(rows, np.int64)
        self.machine = np.zeros(rows, np.int64)
        self.cost = CostColumns.empty(rows)
        self.chunk_tokens = np.full(rows, float(CHUNK_TOKENS))
        self._placed = np.zeros((rows, SIZES))
        """Uncached tokens of the prompts whose first token has not come, summed up to each size."""
        self._left: Floats = np.full(rows, np.inf)
        """Tokens still to be computed of those prompts that the worker has received, as it last said."""
        self._ahead = np.zeros((rows, SIZES))
        self._behind = np.zeros((rows, SIZES))
        self._on_the_way = np.zeros(rows)
        """Tokens of the prompts that the worker has not confirmed."""
        self._share = np.zeros(rows)
        self._aged_at = 0.0
        self._lag = np.ones((rows, 3))
        self.slack_s = np.full(rows, np.inf)
        self._took = np.zeros((rows, 2))
        """Seconds that the latest steps with streams took, and would have taken with streams alone; older ones fade."""
        self._reported = np.full(rows, -np.inf)
        self._alone = np.zeros(rows)
        self._busy_since = np.full(rows, np.inf)
        """When the step that runs now has begun; infinite where none does."""

    def _grow(self) -> None:
        old, rows = self.__dict__.copy(), len(self.ids)
        self._allocate(2 * rows)
        for name, value in old.items():
            if isinstance(value, np.ndarray):
                getattr(self, name)[:rows] = value
        self.ids[:rows] = old["ids"]
        self._aged_at = old["_aged_at"]
        for column, value in zip(_arrays(self.cost), _arrays(old["cost"]), strict=True):
            column[:rows] = value

    def add(
        self,
        row: int,
        worker: WorkerId,
        role: Role,
        *,
        slots: int,
        kv_tokens: int,
        machine: int,
        hands_off: bool,
        lends: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """Use a row for a worker that has just joined."""
        while row >= len(self.ids):
            self._grow()
        self.remove(row)
        self.ids[row] = worker
        self.role[row] = ROLES.index(role)
        self.placeable[row] = True
        self.hands_off[row], self.lends[row] = hands_off, lends
        self.slots[row], self.kv_tokens[row], self.machine[row] = slots, kv_tokens, machine
        self.chunk_tokens[row] = chunk_tokens
        self._unreceived[row] = deque()
        self._sent[row] = 0

    def remove(self, row: int) -> None:
        """Nothing of the row's worker counts any more."""
        self.ids[row] = WorkerId("")
        for column in (self.placeable, self.slots, self.decoding, self.prefilling, self.streams, self.context_tokens):
            column[row] = 0
        for table in (self._placed, self._ahead, self._behind):
            table[row] = 0
        self._on_the_way[row], self._share[row], self._left[row] = 0, 0, np.inf
        self._lag[row], self._took[row], self._reported[row] = 1.0, 0.0, -np.inf
        self._busy_since[row] = self.slack_s[row] = np.inf
        self.cost.put(row, CostModel())
        self._unreceived.pop(row, None)
        self._sent.pop(row, None)
        self._stale.discard(row)
        for source in list(self.unreached):
            self.reaches(source, self.unreached[source] - {row} if source != row else frozenset())

    def reaches(self, row: int, all_but: frozenset[int]) -> None:
        """The row's worker can connect to the others' but for these rows'."""
        if all_but:
            self.unreached[row] = all_but
        else:
            self.unreached.pop(row, None)

    def submitted(self, row: int, uncached: int, work_s: float, now: float) -> None:
        """A prompt with so many tokens to compute, `work_s` seconds of work, is on its way to the worker."""
        self._sent[row] += 1
        self._unreceived[row].append((self._sent[row], uncached))
        self._on_the_way[row] += uncached
        self.prefilling[row] += 1
        size = size_of(uncached)
        self._placed[row, size:] += uncached
        self._behind[row, :size] += 1
        self._age(now)
        self._share[row] += work_s / SHARE_S
        if self._busy_since[row] == np.inf:
            self._busy_since[row] = now
        self._stale.add(row)

    def sent(self, row: int) -> int:
        """How many prompts have been submitted to the row's worker since it joined."""
        return self._sent[row]

    def computed(self, row: int, uncached: int) -> None:
        """That prompt is computed, or is no longer wanted."""
        size = size_of(uncached)
        self.prefilling[row] -= 1
        if not self.prefilling[row]:
            # Nothing can be on the way any more; an attached server would never say so.
            self._unreceived[row].clear()
            self._on_the_way[row] = 0.0
        self._placed[row, size:] -= uncached
        self._behind[row, :size] -= 1
        self._stale.add(row)

    def stepped(self, row: int, alone_s: float, now: float) -> None:
        """A step is over; the next would take `alone_s` if it had only the streams that run now. Call `report` too."""
        took = now - self._reported[row]
        if took > _IDLE_S:
            self._took[row] = 0.0
        elif self.streams[row]:
            self._took[row] *= _FADE
            self._took[row] += (took, self._alone[row])
        self._reported[row], self._alone[row] = now, alone_s
        self._busy_since[row] = now

    def streamed(self, rows: NDArray[np.intp], steps: Floats, took_s: Floats, next_s: Floats, at: Floats) -> None:
        """Workers have made so many steps of nothing but streams, of `took_s` seconds in all, up to `at`; the next
        takes `next_s`. As if each step had been told to `stepped`, and had taken what was predicted."""
        fading = _FADE**steps
        seconds = took_s / steps * (1 - fading) / (1 - _FADE)
        self._took[rows] = self._took[rows] * fading[:, None] + seconds[:, None]
        self._reported[rows] = self._busy_since[rows] = at
        self._alone[rows] = next_s

    def report(self, row: int, load: StepLoad) -> None:
        """What the worker has before it, as it says after a step and now and then."""
        waiting = self._unreceived[row]
        while waiting and waiting[0][0] <= load.received:
            self._on_the_way[row] -= waiting.popleft()[1]
        self.streams[row] = load.streams
        self.slack_s[row] = np.inf if load.slack_s is None else max(0.0, load.slack_s)
        self._left[row] = load.backlog_tokens
        if not load.streams and not load.backlog_tokens and not self._on_the_way[row]:
            self._busy_since[row] = np.inf
        self._stale.add(row)

    def arrived(self, row: int, *, chunked: bool, queue_s: float, own_s: float, actual_s: float) -> None:
        """A first token has come from the worker, later or sooner than the time in the queue and that of its own which
        were predicted when its prompt was placed. One of them is the reason if it was by far the larger."""
        if 0 <= _APART * queue_s <= own_s > 0:
            kind, ratio = int(chunked), (actual_s - queue_s) / own_s
        elif queue_s > own_s:
            kind, ratio = _QUEUE, (actual_s - own_s) / queue_s
        else:
            return
        ratio = min(max(ratio, 1 / _MOST_SURPRISE), _MOST_SURPRISE)
        lag = self._lag[row, kind] * ratio**_LEARNT
        self._lag[row, kind] = min(max(lag, 1 / _MOST_LAG), _MOST_LAG)

    def snapshot(
        self,
        now: float,
        turn: int,
        links: Mapping[tuple[WorkerId, WorkerId], LinkCost],
        window_tokens: int,
        stores: StoreColumns | None = None,
    ) -> Snapshot:
        """The columns as they are; valid until the next change."""
        self._refresh()
        self._age(now)
        share = np.minimum(self._share, _MOST_SHARE)
        return Snapshot(
            ids=self.ids,
            role=self.role,
            placeable=self.placeable,
            hands_off=self.hands_off,
            slots=self.slots,
            decoding=self.decoding,
            prefilling=self.prefilling,
            streams=self.streams,
            ahead_tokens=self._ahead,
            prompts_behind=self._behind,
            context_tokens=self.context_tokens,
            kv_tokens=self.kv_tokens,
            prefill_share=share,
            stretch=self._stretch(share),
            lag=self._lag,
            slack_s=self.slack_s,
            step_age_s=np.maximum(now - self._busy_since, 0.0),
            cost=self.cost,
            chunk_tokens=self.chunk_tokens,
            machine=self.machine,
            turn=turn,
            links=links,
            stores=stores,
            unreached=self.unreached,
            window_tokens=window_tokens,
        )

    def _refresh(self) -> None:
        """Backlogs of the rows that have changed: what was placed, less what is done of it, short prompts first."""
        if not self._stale:
            return
        rows = list(self._stale)
        self._stale.clear()
        at = rows if len(rows) > 1 else rows[0]  # a single row is looked up five times as fast
        placed = self._placed[at]
        done = np.maximum(placed[..., -1] - self._on_the_way[at] - self._left[at], 0.0)
        self._ahead[at] = np.maximum(placed - done[..., None], 0.0)

    def _stretch(self, share: Floats) -> Floats:
        """By the steps that have been seen of a worker; where these are few by those of all, and else by the share of
        time that prompts take."""
        took, alone = np.add.reduce(self._took, axis=0)
        usual = (took + _FEW_S / (1.0 - share)) / (alone + _FEW_S)
        stretch: Floats = (self._took[:, 0] + _SOME_S * usual) / (self._took[:, 1] + _SOME_S)
        return np.maximum(stretch, _LEAST_STRETCH)

    def _age(self, now: float) -> None:
        if now - self._aged_at > _AGE_EACH_S:
            self._share *= math.exp((self._aged_at - now) / SHARE_S)
            self._lag **= math.exp((self._aged_at - now) / _MEMORY_S)
            self._took[now - self._reported > _IDLE_S] = 0.0
            self._aged_at = now


_FADE = 1 - 1 / 200
"""What an earlier step counts beside the next."""
_AGE_EACH_S = 0.02
"""What fades over many seconds need not be touched at every decision of the same moment."""
_IDLE_S = 2.0
"""A worker that reports no step for so long had none: what it took before says nothing of what comes."""
_FEW_S, _SOME_S = 0.05, 1.0
"""Seconds of steps."""
_LEAST_STRETCH = 0.8
_LEARNT = 0.1
"""How much of a surprise the next prediction takes over."""
_MOST_SURPRISE = 1.3
"""What one arrival counts for at most: the typical one is to be foretold, not the mean of a few that came very late."""
_MOST_LAG = 8.0
_APART = 4.0
"""How many times longer than the queue a prompt's own time is, to be learnt from by itself."""
_QUEUE = 2
"""The column of `_lag` for time in the queue."""
_MEMORY_S = 60.0
"""Seconds after which a surprise counts for a third: else a worker that was slow once would be given nothing that could
show it to be fast again."""
_MOST_SHARE = 0.9
"""A worker that would be busy with prompts for all its time still is expected to bring its streams on."""


def _arrays(cost: CostColumns) -> list[Floats]:
    return [getattr(cost, name) for name in cost.__struct_fields__]
