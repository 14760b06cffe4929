"""Many questions side by side: deployments under loads as columns, which physics and correction answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bascule.analytic.deployment import FRAMEWORKS, Deployment, Load, Spread, worker_row
from bascule.analytic.physics import Array, Efficiency, Worker, kv_bytes_kept, weight_bytes
from bascule.analytic.serving import Timing, Traffic, aggregated, disaggregated

Indices = NDArray[np.int64]
_Columns = TypeVar("_Columns", Worker, Traffic, Efficiency, Timing)


@dataclass(frozen=True)
class Questions:
    """One row for each deployment under its load."""

    worker: Worker
    """Of the workers that decode, or do all."""
    prefill_worker: Worker
    """The same as `worker` where none only prefills."""
    traffic: Traffic
    """Clients of one worker, where each does all."""
    split: Array
    """1 for disaggregated rows, else 0."""
    prefill_workers: Array
    """How many; NaN where nobody said."""
    workers: Array
    node: Array
    dated: Array
    version: Array
    framework: Array
    """[rows, frameworks]; 1 in the column of the row's own."""

    @classmethod
    def of(cls, deployments: Sequence[Deployment], loads: Sequence[Load]) -> Questions:
        """Questions in the order given."""
        prefill = [each.prefill or each.decode for each in deployments]
        decode = [each.decode for each in deployments]
        return cls(
            worker=_workers(deployments, decode),
            prefill_worker=_workers(deployments, prefill),
            traffic=Traffic(
                prompt=_column([load.prompt for load in loads]),
                output=_column([load.output for load in loads]),
                concurrency=_column([_clients(each, load) for each, load in zip(deployments, loads, strict=True)]),
            ),
            split=_column([each.prefill is not None for each in deployments]),
            prefill_workers=_column([spread.workers for spread in prefill]),
            workers=_column([spread.workers for spread in decode]),
            node=_column([each.hardware.node for each in deployments]),
            dated=_column([each.dated for each in deployments]),
            version=_column([each.version for each in deployments]),
            framework=np.array([[each.framework == name for name in FRAMEWORKS] for each in deployments], np.float64),
        )

    def __len__(self) -> int:
        return len(self.split)

    def take(self, rows: Indices) -> Questions:
        """The questions of these rows, in this order, any of them more than once."""
        columns: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            columns[field.name] = value[rows] if isinstance(value, np.ndarray) else take(value, rows)
        return Questions(**columns)

    def under(self, concurrency: Array) -> Questions:
        """The same with other numbers of clients."""
        return replace(self, traffic=replace(self.traffic, concurrency=concurrency))

    def undated(self) -> Questions:
        """The same of frameworks of which one does not know how new they are."""
        unknown = np.full(len(self), np.nan)
        return replace(self, dated=unknown, version=unknown)

    def timing(self, efficiency: Efficiency) -> Timing:
        """What physics says of each row."""
        together = aggregated(self.worker, efficiency, self.traffic)
        if not self.split.any():
            return together
        apart = disaggregated(
            self.prefill_worker, self.worker, efficiency, self.traffic, self.prefill_workers, self.workers
        )
        columns = {}
        for field in fields(Timing):
            columns[field.name] = np.where(self.split > 0, getattr(apart, field.name), getattr(together, field.name))
        return Timing(**columns)

    def features(self, timing: Timing) -> dict[str, Array]:
        """What the correction may look at, by name; NaN where something is not known. No model's name is among them."""
        worker, prefill, traffic = self.worker, self.prefill_worker, self.traffic
        only_split = np.where(self.split > 0, 1.0, np.nan)
        columns = {
            "split": self.split,
            "prompt": traffic.prompt,
            "output": traffic.output,
            "concurrency": traffic.concurrency,
            "prefill_s": timing.prefill,
            "decode_s": timing.decode,
            "tpot_s": timing.tpot,
            "ttft_s": timing.ttft,
            "mixed": timing.tpot / timing.decode,
            "streams": timing.streams,
            "crowd": traffic.concurrency / timing.streams,
            "streams_a_gpu": timing.streams / worker.devices,
            "prefill_load": timing.prefill * timing.streams / (traffic.output * timing.decode),
            "tp": worker.tp,
            "dp": worker.dp,
            "ep": worker.ep,
            "gpus": worker.devices,
            "prefill_gpus": only_split * prefill.devices,
            "prefill_ep": only_split * prefill.ep,
            "prefill_dp": only_split * prefill.dp,
            "prefill_workers": only_split * self.prefill_workers,
            "decode_workers": only_split * self.workers,
            "active": worker.base_parameters + worker.expert_parameters * worker.routed_share,
            "parameters": worker.base_parameters + worker.expert_parameters,
            "routed_share": worker.routed_share,
            "hidden": worker.hidden,
            "layers": worker.layers,
            "kv": kv_bytes_kept(worker, traffic.prompt + traffic.output),
            "weights": weight_bytes(worker),
            "room": weight_bytes(worker) / worker.memory,
            "base_bytes": worker.base_bytes,
            "expert_bytes": np.where(worker.expert_parameters > 0, worker.expert_bytes, np.nan),
            "peak": worker.peak,
            "memory_rate": worker.memory_rate,
            "memory": worker.memory,
            "node": self.node,
            "dated": self.dated,
            "version": self.version,
        }
        return columns | {f"framework={name}": self.framework[:, at] for at, name in enumerate(FRAMEWORKS)}


def take(columns: _Columns, rows: Indices) -> _Columns:
    """These rows of a dataclass of columns."""
    return type(columns)(*(getattr(columns, field.name)[rows] for field in fields(columns)))


def _workers(deployments: Sequence[Deployment], spreads: Sequence[Spread]) -> Worker:
    rows = [worker_row(each, spread) for each, spread in zip(deployments, spreads, strict=True)]
    return Worker(**{field.name: _column([row[field.name] for row in rows]) for field in fields(Worker)})


def _clients(deployment: Deployment, load: Load) -> float:
    """Of all workers together, or of one of them where each does all."""
    replicas = 1 if deployment.prefill else deployment.decode.workers or 1
    return max(1.0, load.concurrency / replicas)


def _column(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
