"""What is asked of the predictor: a model on hardware, spread over GPUs in some way, under some traffic."""

from __future__ import annotations

from msgspec import Struct

from bascule.analytic.catalogue import Hardware
from bascule.analytic.shapes import ModelShape

FRAMEWORKS = ("trtllm", "vllm", "sglang")
NUMBER_BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.53125, "int8_wo": 1.0}
"""Bytes of a weight, scales included."""
_COMPUTED_IN = {"bf16": "bf16", "fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4", "int4_wo": "bf16", "int8_wo": "bf16"}


class Spread(Struct, frozen=True, kw_only=True):
    """How one worker lies over GPUs."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    """Replicas of the attention, which share the experts."""
    moe_tp: int = 1
    ep: int = 1
    """Ways by which whole experts are apart."""
    workers: int | None = 1
    """Workers of this kind; None where nobody said."""


class Deployment(Struct, frozen=True, kw_only=True):
    """Workers of one model and kind of GPU."""

    model: str
    """The shape's name in the catalogue; by this and the two below one knows what was measured."""
    shape: ModelShape
    system: str
    hardware: Hardware
    framework: str
    """One of `FRAMEWORKS`, or another that no calibration knows."""
    weights: str = "bf16"
    """A key of `NUMBER_BYTES`."""
    expert_weights: str | None = None
    """None: as `weights`."""
    kv_bytes: float = 2.0
    """Of each number of KV."""
    decode: Spread
    """Of all workers, where none only prefills."""
    prefill: Spread | None = None
    """Of those that only prefill."""
    dated: float | None = None
    """When this was run, in years of the calendar (2026.25: end of March): frameworks get faster. None: not known."""
    version: float | None = None
    """Of the framework, as major + minor / 100 + patch / 10,000; None: not known."""

    @property
    def experts_in(self) -> str:
        return self.expert_weights or self.weights


class Load(Struct, frozen=True, kw_only=True):
    """A closed loop of `concurrency` clients; lengths in tokens."""

    prompt: int
    output: int
    concurrency: int


def worker_row(deployment: Deployment, spread: Spread) -> dict[str, float]:
    """One row of `physics.Worker`, by its fields."""
    shape, hardware = deployment.shape, deployment.hardware
    devices = spread.tp * spread.dp
    ways = max(1, min(devices, max(spread.moe_tp * spread.ep, 1))) if shape.experts else devices
    within = devices * spread.pp <= hardware.node
    return {
        "hidden": shape.hidden,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "attention_layers": shape.attention_layers,
        "window_layers": shape.window_layers,
        "window": shape.window,
        "attended": shape.attended,
        "base_parameters": shape.attention_parameters + shape.dense_parameters,
        "head_parameters": shape.head_parameters,
        "expert_parameters": shape.expert_parameters,
        "routed_share": shape.routed_share,
        "experts_per_token": shape.experts_per_token,
        "kv_numbers": shape.kv_numbers,
        "state_numbers": shape.state_numbers,
        "pair_flops": shape.pair_flops,
        "base_bytes": NUMBER_BYTES[deployment.weights],
        "expert_bytes": NUMBER_BYTES[deployment.experts_in],
        "kv_bytes": deployment.kv_bytes,
        "peak": hardware.peak(_COMPUTED_IN[deployment.weights]),
        "expert_peak": hardware.peak(_COMPUTED_IN[deployment.experts_in]),
        "attention_peak": hardware.peak("bf16"),
        "memory_rate": 1e12 * hardware.memory_tb_s,
        "memory": 1e9 * hardware.memory_gb,
        "link_rate": 1e9 * (hardware.link_gb_s if within else hardware.nic_gbit_s / 8),
        "tp": spread.tp,
        "pp": spread.pp,
        "dp": spread.dp,
        "expert_ways": ways,
        "ep": spread.ep,
    }
