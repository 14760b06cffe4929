"""Rules of thumb of the literature, each with what it says here; where the figures say otherwise, why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct

from bascule.planning.candidates import Candidate
from bascule.planning.fluid import Scale
from bascule.planning.search import EQUAL, Search
from bascule.planning.trial import Result
from bascule.sim.offered import full_step_share

Says = Literal["split", "whole"]

_LARGE = 30e9
"""Parameters."""
_LONG_TOKENS, _LONG_RATIO = 2048, 10.0
_FEW_STREAMS = 2.0
_BALANCE = 0.67
"""Of a worker: a pool whose share is less than this cannot be built without waste."""


class Rule(Struct, frozen=True, kw_only=True):
    """One rule, applied."""

    about: str
    rule: str
    here: str
    says: Says | None
    """None where its input is not known."""


def rules(search: Search, money: float) -> Iterator[Rule]:
    """All, for what so much money buys."""
    demand, scale = search.ask.setting.demand, search.scale
    sizes = [one.parameters for one in search.ask.classes if one.parameters is not None]
    size = sizes[0] if sizes else None
    yield Rule(
        about="model size",
        rule="split medium to large models (llm-d); here taken as 30 billion parameters and more",
        here="the model's size is not known" if size is None else f"{size / 1e9:.3g} billion parameters",
        says=None if size is None else "split" if size >= _LARGE else "whole",
    )
    ratio = demand.prompt_tokens / demand.output_tokens
    yield Rule(
        about="prompt length",
        rule=f"prefill elsewhere what has {_LONG_TOKENS:,} uncached tokens or more (Dynamo)",
        here=f"{demand.new_tokens:,.0f} uncached tokens of {demand.prompt_tokens:,.0f} on average",
        says="split" if demand.new_tokens >= _LONG_TOKENS else "whole",
    )
    yield Rule(
        about="length mix",
        rule=f"split where prompts are {_LONG_RATIO:g} times as long as outputs (llm-d)",
        here=f"{ratio:.2g} times",
        says="split" if ratio >= _LONG_RATIO else "whole",
    )
    yield _concurrency(search, money)
    split = max(
        (one for one in search.all if one.splits and one.money <= money * (1 + EQUAL)),
        key=lambda one: scale.of(one).capacity,
        default=None,
    )
    if split is not None:
        yield _network(scale, split)
        yield _balance(scale, split)
    slo = search.ask.setting.slo
    bound = slo.gap_s < math.inf or slo.tpot_s < math.inf
    yield Rule(
        about="throughput",
        rule="splitting keeps tokens even and does not raise throughput (vLLM)",
        here="the SLO bounds " + ("gaps or TPOT" if bound else "neither gaps nor TPOT, so only throughput counts"),
        says="split" if bound else "whole",
    )


def disagreement(rule: Rule, pick: Result, others: Sequence[Result]) -> str | None:
    """Why the figures say something else than the rule; None where they agree."""
    if rule.says is None or rule.says == ("split" if pick.candidate.splits else "whole"):
        return None
    if pick.candidate.architecture == "adaptive" and pick.mean("handoffs") > 0.5 * pick.mean("requests"):
        return None if rule.says == "split" else _for_splitting(pick, others)
    return _for_splitting(pick, others) if rule.says == "whole" else _against_splitting(pick, others)


def _for_splitting(pick: Result, others: Sequence[Result]) -> str:
    whole = max((one for one in others if not one.candidate.splits), key=lambda one: one.goodput, default=None)
    if whole is None:
        return "nothing that serves whole requests was in the running"
    name, share = max(whole.missed().items(), key=lambda item: item[1])
    return (
        f"{whole.candidate} misses the {_LONG[name]} in {share:.0%} of requests, as prompts and running streams share "
        f"steps there; of the pick it is {pick.missed()[name]:.0%}"
    )


def _against_splitting(pick: Result, others: Sequence[Result]) -> str:
    split = max((one for one in others if one.candidate.splits), key=lambda one: one.goodput, default=None)
    if split is None:
        return "no split fits into this budget"
    if split.goodput >= pick.goodput * (1 - EQUAL):
        costs = ", and costs more" if split.candidate.money > pick.candidate.money * (1 + EQUAL) else ""
        return (
            f"a split has as much goodput ({split.goodput:.3g} to {pick.goodput:.3g} requests/s){costs}: what whole "
            f"requests suffer from costs too little here (longest gaps {pick.mean('itl_s', 'max'):.3f} s)"
        )
    return f"{split.candidate} {why_behind(split)}"


def why_behind(result: Result) -> str:
    """What a candidate misses most, and which of its pools is why; begins with a verb."""
    name, share = max(result.missed().items(), key=lambda item: item[1])
    busy = result.busy
    told = f"misses the {_LONG[name]} in {share:.0%} of requests"
    if share < 0.005:
        return "misses nothing, and is no better"
    pools = ", ".join(f"{role} workers {value:.0%}" for role, value in busy.items())
    if len(busy) > 1 and name in ("ttft", "rejected") and busy.get("prefill", 0) > 0.8:
        return f"{told}: its pools do not match the traffic (busy: {pools}), and prompts wait for the smaller one"
    if name == "gap" and len(busy) == 1:
        return f"{told}: prompts are computed between its streams' tokens (longest {result.mean('itl_s', 'max'):.3f} s)"
    if name == "gap":
        return f"{told}: the second token waits for the KV (longest {result.mean('itl_s', 'max'):.3f} s)"
    return f"{told} (busy: {pools})"


_LONG = {
    "ttft": "bound on TTFT",
    "tpot": "bound on TPOT",
    "gap": "bound on gaps",
    "rejected": "queue, being refused,",
    "error": "end, failing,",
}


def _concurrency(search: Search, money: float) -> Rule:
    demand = search.ask.setting.demand
    whole = max(
        (one for one in search.all if not one.splits and one.money <= money * (1 + EQUAL)),
        key=lambda one: search.scale.of(one).capacity,
        default=search.all[0],
    )
    work = search.scale.work(whole.shares[0].of)
    running = float(demand.clients or 0) or (demand.rate or 0.0) * work.alone_s
    streams = running / whole.workers
    return Rule(
        about="concurrency",
        rule="with few streams a worker there is little that a prompt could disturb: fewer than two need no split",
        here=f"about {streams:.1f} requests at once on each of {whole.workers} whole workers, if none waits",
        says="split" if streams >= _FEW_STREAMS else "whole",
    )


def _network(scale: Scale, split: Candidate) -> Rule:
    prefill = split.shares[0]
    tokens_per_s = scale.demand.new_tokens / scale.work(prefill.of).prefill_s
    need = tokens_per_s * prefill.of.kv_token_bytes
    inside = scale.on_one_machine(split)
    sharing = prefill.count if inside else min(prefill.count, max(1, scale.links.machine_devices // prefill.of.devices))
    have = (scale.links.within if inside else scale.links.between) / sharing
    where = "within a machine" if inside else "between machines"
    return Rule(
        about="network",
        rule="a prefill worker needs a token's KV times its tokens/s; 25 GbE is too little for an 8B model on a GPU",
        here=f"each of {prefill.count} needs {need / 1e9:.3g} GB/s and has {have / 1e9:.3g} {where}",
        says="split" if have >= need else "whole",
    )


def _balance(scale: Scale, split: Candidate) -> Rule:
    prefill, decode = split.shares
    demand = scale.demand
    context = demand.prompt_tokens + demand.output_tokens / 2
    before = scale.work(prefill.of).prefill_s
    slo = scale.slo
    after = max(demand.output_tokens * full_step_share(decode.of.kind, context, slo.tpot_s), 1e-12)
    workers = prefill.count + decode.count
    ideal = workers * before / (before + after)
    matched = min(ideal, workers - ideal)
    return Rule(
        about="pool sizes",
        rule="as many prefill and decode workers as a request takes time of each; too few in all waste one side",
        here=(
            f"{ideal:.2g} of {workers} would prefill: a request takes {before:.3g} s there, and {after:.3g} s of full "
            "steps"
        ),
        says="split" if matched >= _BALANCE else "whole",
    )
