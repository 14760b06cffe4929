"""Whether stored KV is worth loading: only where that is predicted to take less time than computing it anew.

And whether it is worth waiting for, or rather loaded from the back while the prompt is computed from the front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bascule.policies.cost import PrefillPart, part_seconds
from bascule.policies.snapshot import CHUNK_TOKENS
from bascule.types import CostModel, LinkCost, Tier

UNMEASURED = {Tier.HOST: LinkCost(0.001, 1e9), Tier.DISK: LinkCost(0.002, 5e8), Tier.REMOTE: LinkCost(0.003, 1e8)}
"""What loading from a tier is taken to cost before it has been done."""
_OVERRUN = 1.5
"""How many times longer than predicted a load may take before it is not waited for any more."""
LEAST_SHARE = 0.1
"""Of the computing that it spares, what a load may take in any case: a step that begins too early costs more."""
_BESIDE = 2.0
"""How many times longer than computing a load may take that goes on beside it: such a one spares a third."""


def load_seconds(costs: Mapping[Tier, LinkCost], tokens: Mapping[Tier, int], token_bytes: int) -> float:
    """Predicted seconds to load so many tokens' KV, of `token_bytes` each, from each tier."""
    used = ((costs[tier], count) for tier, count in tokens.items() if count)
    return sum(cost.latency_s + count * token_bytes / cost.bytes_per_s for cost, count in used)


def prompt_seconds(model: CostModel, tokens: int, cached: int, chunk_tokens: int = CHUNK_TOKENS) -> float:
    """Predicted seconds to compute what is behind the `cached` first of a prompt's `tokens`, alone."""
    new = max(tokens - cached, 0)
    return part_seconds(model, PrefillPart(new, cached)) + model.step_s * math.ceil(new / chunk_tokens)


def blocks_to_load(
    run: Sequence[Tier],
    costs: Mapping[Tier, LinkCost],
    model: CostModel,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    block_tokens: int,
    token_bytes: int,
) -> int:
    """How many leading blocks of `run`, which follow the cached ones, to load so that the prompt is soonest computed.

    All or a beginning: what is left out has to be computed, and all behind it. While nothing is known of what computing
    costs (a model of zeros), all.
    """
    if model == CostModel():
        return len(run)
    best, least = 0, prompt_seconds(model, prompt_tokens, cached_tokens)
    tokens: dict[Tier, int] = {}
    for blocks, tier in enumerate(run, 1):
        tokens[tier] = tokens.get(tier, 0) + block_tokens
        if blocks < len(run) and run[blocks] is tier:
            continue  # a tier's blocks cost the same each, and computing costs more the further back: all, or none
        loaded = cached_tokens + blocks * block_tokens
        seconds = load_seconds(costs, tokens, token_bytes) + prompt_seconds(model, prompt_tokens, loaded)
        if seconds < least:
            best, least = blocks, seconds
    return best


def patience_seconds(load_s: float, compute_s: float, step_s: float) -> float:
    """How long a prompt is to wait for a load of `load_s` that spares it `compute_s`; 0 for not at all.

    Who waits has everything after `load_s`. Who computes from the front while it is loaded from the back has it after
    load * compute / (load + compute), and half a step later (`step_s`), because what has come is used from the next
    step on. A load that takes longer than predicted is not waited for to its end.
    """
    both = load_s + compute_s
    if not both or load_s > load_s * compute_s / both + min(step_s, compute_s) / 2:
        return 0.0
    return max(_OVERRUN * load_s, LEAST_SHARE * compute_s)


def worth_loading_beside(load_s: float, compute_s: float) -> bool:
    """Whether to load from the back what is not worth waiting for, while it is computed from the front.

    Both meet after load * compute / (load + compute). A load that is much slower than computing spares little of that,
    and takes its time from a processor and a link that others use.
    """
    return load_s < _BESIDE * compute_s
