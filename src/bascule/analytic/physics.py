"""What one step takes on a worker: rooflines of compute, memory and links, from counted work and fitted efficiencies.

Everything here is arithmetic on numpy arrays of one row per question, so that a table is judged at once. Units: bytes,
operations, seconds, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Worker:
    """A model on a group of GPUs, one row each: what is counted, not fitted."""

    # The model.
    hidden: Array
    layers: Array
    heads: Array
    kv_heads: Array
    attention_layers: Array
    window_layers: Array
    window: Array
    attended: Array
    base_parameters: Array
    """Attention, dense feed-forward and shared experts."""
    head_parameters: Array
    expert_parameters: Array
    routed_share: Array
    experts_per_token: Array
    kv_numbers: Array
    state_numbers: Array
    pair_flops: Array
    # Its numbers.
    base_bytes: Array
    """Bytes of a parameter."""
    expert_bytes: Array
    kv_bytes: Array
    # The hardware.
    peak: Array
    """Operations per second in the type that the products are computed in."""
    expert_peak: Array
    attention_peak: Array
    memory_rate: Array
    memory: Array
    """Bytes of one GPU."""
    link_rate: Array
    """Bytes per second one way, of the slowest link within the group."""
    # How they are spread.
    tp: Array
    pp: Array
    """Stages; a step of one stream passes all, and as many steps are under way."""
    dp: Array
    """Replicas of the attention."""
    expert_ways: Array
    """GPUs that share the experts."""
    ep: Array
    """Of these, how many ways by whole experts."""

    @property
    def devices(self) -> Array:
        return self.tp * self.pp * self.dp


@dataclass(frozen=True)
class Efficiency:
    """What of the limits is reached, and what comes on top; one row each, see `DEFAULTS` for units."""

    compute: Array
    attention: Array
    expert: Array
    memory: Array
    expert_memory: Array
    kv: Array
    layer: Array
    step: Array
    stream: Array
    hop: Array
    link: Array
    mix: Array
    queue: Array
    spread: Array
    start: Array
    handoff: Array
    crowding: Array


LIMITS = dict.fromkeys(("compute", "attention", "expert", "memory", "expert_memory", "kv", "link", "spread"), 1.0)
LIMITS |= dict.fromkeys(("layer", "step", "stream", "hop", "mix", "queue", "start", "handoff", "crowding"), 0.0)
"""The plain roofline: every limit is reached, nothing comes on top, nobody waits."""

MEMORY_SHARE = 0.9
"""Of a GPU's memory that a framework takes for weights and KV."""

DEFAULTS = {
    "compute": 0.55,
    "attention": 0.35,
    "expert": 0.4,
    "memory": 0.7,
    "expert_memory": 0.6,
    "kv": 0.5,
    "layer": 10e-6,
    "step": 1e-3,
    "stream": 10e-6,
    "hop": 6e-6,
    "link": 0.5,
    "mix": 0.8,
    "queue": 0.25,
    "spread": 1.0,
    "start": 0.02,
    "handoff": 0.05,
    "crowding": 0.3,
}
"""Before any fit. `compute` ... `kv` and `link` are shares of a limit; `layer`, `step`, `stream` and `hop` seconds for
each layer, step, stream and collective; `start` and `handoff` seconds of a request; the others: see `serving`."""


def attended_tokens(worker: Worker, context: Array) -> Array:
    """Tokens whose KV a new token reads behind `context`, summed over the layers."""
    full = np.where(worker.attended > 0, np.minimum(context, worker.attended), context)
    windowed = np.minimum(context, worker.window)
    return (worker.attention_layers - worker.window_layers) * full + worker.window_layers * windowed


def kv_bytes_kept(worker: Worker, tokens: Array) -> Array:
    """Bytes of KV and state that a sequence of `tokens` keeps on each GPU that has a part of it."""
    layers = worker.attention_layers - worker.window_layers
    kept = layers * tokens + worker.window_layers * np.minimum(tokens, worker.window)
    split = np.minimum(worker.tp, worker.kv_heads)
    return kept * worker.kv_numbers * worker.kv_bytes / split + 2 * worker.state_numbers / worker.tp


def weight_bytes(worker: Worker) -> Array:
    """Bytes of weights on each GPU."""
    base = worker.base_parameters * worker.base_bytes + 4 * worker.head_parameters
    return (base / worker.tp + worker.expert_parameters * worker.expert_bytes / worker.expert_ways) / worker.pp


def streams_that_fit(worker: Worker, tokens: Array) -> Array:
    """Sequences of `tokens` that a worker's memory holds besides the weights; at least one for each replica."""
    room = MEMORY_SHARE * worker.memory - weight_bytes(worker)
    return worker.dp * np.maximum(1.0, worker.pp * room / kv_bytes_kept(worker, tokens))


def step_seconds(
    worker: Worker, efficiency: Efficiency, tokens: Array, streams: Array, context: Array, pairs: Array
) -> Array:
    """A step over `tokens` new tokens of `streams` sequences, in all replicas of the attention together.

    Each sequence has KV of `context` tokens that is read; `pairs` are the pairs of (new token, token it attends to) in
    one layer that sees everything.
    """
    own, every = tokens / worker.dp, tokens
    touched = 1 - (1 - worker.routed_share) ** every
    base_flops = (
        2 * own * worker.base_parameters / worker.tp + 2 * streams / worker.dp * worker.head_parameters / worker.tp
    )
    expert_flops = 2 * every * worker.routed_share * worker.expert_parameters / worker.expert_ways
    seen = attended_tokens(worker, context) / np.maximum(1.0, context)
    attention_flops = pairs * seen * worker.pair_flops / worker.tp / worker.dp
    compute = base_flops / (worker.peak * efficiency.compute)
    compute_experts = expert_flops / (worker.expert_peak * efficiency.expert)
    base = (worker.base_parameters * worker.base_bytes + 2 * worker.head_parameters) / worker.tp
    experts = worker.expert_parameters * worker.expert_bytes * touched / worker.expert_ways
    read = base / (worker.memory_rate * efficiency.memory)
    read_experts = experts / (worker.memory_rate * efficiency.expert_memory)
    split = np.minimum(worker.tp, worker.kv_heads)
    kv = (
        attended_tokens(worker, context) * worker.kv_numbers * worker.kv_bytes / split
        + 4 * worker.state_numbers / worker.tp
    )
    read_kv = streams / worker.dp * kv / (worker.memory_rate * efficiency.kv)
    attend = attention_flops / (worker.attention_peak * efficiency.attention)
    return (
        np.hypot(compute, read)
        + np.hypot(compute_experts, read_experts)
        + np.hypot(attend, read_kv)
        + _collectives(worker, efficiency, own, every)
        + worker.layers * efficiency.layer
        + efficiency.step
        + streams / worker.dp * efficiency.stream
    )


def _collectives(worker: Worker, efficiency: Efficiency, own: Array, every: Array) -> Array:
    """All-reduces after attention and feed-forward of each layer; all-to-alls where whole experts are apart."""
    rate = worker.link_rate * efficiency.link
    reduces = np.where(worker.tp > 1, 2.0, 0.0)
    reduced = reduces * 2 * (worker.tp - 1) / worker.tp * own * worker.hidden * 2
    apart = np.where((worker.ep > 1) & (worker.dp > 1), 1.0, 0.0)
    copies = np.minimum(worker.experts_per_token, worker.ep)
    sent = apart * 3 * every / worker.devices * copies * worker.hidden
    hops = reduces * np.log2(np.maximum(2.0, worker.tp)) + 2 * apart * np.log2(np.maximum(2.0, worker.ep))
    seconds: Array = worker.layers * (hops * efficiency.hop + (reduced + sent) / rate)
    return seconds
