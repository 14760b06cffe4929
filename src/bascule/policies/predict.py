"""What a placement would bring: queueing, prefill, what is left of the handoff, the pace of decoding, and the harm to
those already there. All times in seconds; of all workers, arrays with one entry a row of the snapshot.

One request more on a worker, waiting or decoding, never makes any of this better; tests hold it to that.
"""

from __future__ import annotations

from typing import Generic

from msgspec import Struct

from bascule.policies.batch import GAP_MARGIN, LEAST_CHUNK, TPOT_MARGIN
from bascule.policies.cost import Floats
from bascule.policies.inputs import Arithmetic, Number, Workers, of_all, own_context
from bascule.policies.snapshot import RouteQuery, Snapshot

_SHARED = 0.02
"""A worker that spends less of its time on prompts than this decodes undisturbed."""


class PrefillSide(Struct, Generic[Number], frozen=True):
    """What prefilling the prompt on each worker means."""

    queue_s: Number
    load_s: Number
    """What bringing KV takes longer than the queue; 0 where none is brought."""
    prefill_s: Number
    last_tokens: Number
    """At most so many are in the last chunk, whose handoff nothing hides."""
    step_s: Number
    """A step with a chunk of the prompt: the gap that it makes in the streams beside it."""
    harm_s: Number


class DecodeSide(Struct, Generic[Number], frozen=True):
    """What decoding the output on each worker means."""

    step_s: Number
    """A step with this stream in it and no prompt."""
    tpot_s: Number
    """With the prompts that wait now, there and in the line, which this stream's steps have to carry."""
    tpot_more_s: Number
    """By how much this stream slows those beside it."""
    gap_s: Number
    harm_s: Number


def predict(snapshot: Snapshot, query: RouteQuery) -> tuple[PrefillSide[Floats], DecodeSide[Floats]]:
    """Predict the way to the first token, and the way on from there, on each worker."""
    return both_sides(of_all(snapshot, query), query)


def both_sides(workers: Workers[Number], query: RouteQuery) -> tuple[PrefillSide[Number], DecodeSide[Number]]:
    """The same of the workers of which these are the inputs."""
    math = workers.math
    # The streams that run on average until the prompt is computed, of which those that go before it become some, and
    # those that will run with this one.
    coming = (workers.prefilling - workers.behind) / 2
    streams = math.least(workers.streams + coming, workers.decoding)
    now, then = workers.steps(streams, workers.decoding + 1.0)
    token = workers.token_s + workers.pair_s * (query.prompt_tokens - workers.new / 2)
    chunk_now, chunk_then = (_chunk(workers, query, steps.beside, token) for steps in (now, then))
    pace = _pace(workers, query, streams, now.alone, now.beside, token, chunk_now)
    more = then.slope + workers.context_s * own_context(query)
    with_chunk, with_least = (
        math.most(then.beside + tokens * token, then.alone) for tokens in (chunk_then, LEAST_CHUNK)
    )
    prefill = _prefill(workers, query, token, pace)
    return prefill, _decode(workers, query, then.alone, more, with_chunk, with_least)


class _Pace(Struct, Generic[Number], frozen=True):
    """How prompts get on beside the streams of each worker, whose own part of a step is `base` seconds, and which take
    `alone` seconds without: `chunk` tokens a step for the first `fast` tokens, which use up what the streams have saved
    of their TPOT, then `paced` a step."""

    alone: Number
    base: Number
    chunk: Number
    fast: Number
    paced: Number

    def steps(self, tokens: Number, math: Arithmetic[Number]) -> Number:
        """Steps that so many tokens take."""
        slow = math.most(tokens - self.fast, 0.0)
        return (tokens - slow) / self.chunk + slow / self.paced


def _pace(
    workers: Workers[Number],
    query: RouteQuery,
    streams: Number,
    alone: Number,
    base: Number,
    token: Number,
    chunk: Number,
) -> _Pace[Number]:
    """`chunk` is what the gap lets through."""
    math = workers.math
    chunk = math.choose(streams > 0, chunk, workers.chunk_tokens)
    kept = TPOT_MARGIN * query.tpot_planned_s
    fast = workers.slack_s * chunk / math.most(base + chunk * token - kept, 1e-12)
    paced = math.least(math.most((kept - base) / math.most(token, 1e-12), LEAST_CHUNK), chunk)
    return _Pace(alone, base, chunk, fast, paced)


def _prefill(workers: Workers[Number], query: RouteQuery, token: Number, pace: _Pace[Number]) -> PrefillSide[Number]:
    """Each of the prompt's tokens takes `token` seconds."""
    math = workers.math
    base, chunk, new, ahead, total = pace.base, pace.chunk, workers.new, workers.ahead, workers.total
    # The step that runs now: one of streams, or one with a chunk in it of those that have to keep a gap.
    chunk_now = math.least(math.least(total, workers.chunk_tokens) * token, GAP_MARGIN * query.gap_planned_s)
    running = math.most(chunk_now + base * (total > 0), pace.alone)
    own = new * token
    steps = pace.steps(ahead, math)
    waiting = math.most(running - workers.step_age_s, 0.0) + ahead * token + steps * base
    queue = workers.queue_lag * waiting
    own_steps = math.most(math.up(new / chunk), pace.steps(ahead + new, math) - steps)
    return PrefillSide(
        queue_s=queue,
        load_s=math.most(workers.brought.seconds - queue, 0.0),
        prefill_s=workers.lag * math.most(own + own_steps * base, math.most(pace.alone, workers.one_s)),
        last_tokens=math.least(new, workers.chunk_tokens),
        step_s=math.most(base + math.least(chunk, new) * token, pace.alone),
        harm_s=(workers.streams + workers.behind) * own,
    )


def _decode(
    workers: Workers[Number],
    query: RouteQuery,
    after: Number,
    more: Number,
    shared: Number,
    least: Number,
) -> DecodeSide[Number]:
    """Steps with this stream in them: of streams alone (`more` is its part), with a chunk of somebody's prompt, and
    with the least of one. Prompts slow a stream to the TPOT that workers plan for it, and not further; whatever else
    makes steps longer than predicted, they cannot cut."""
    math = workers.math
    more = more * workers.stretch
    prompts = workers.total * workers.token_s + workers.line_s
    pace = after * workers.stretch
    carried = math.least(pace + prompts / query.output_tokens, math.most(pace, shared))
    planned = math.most(math.most(least, after), TPOT_MARGIN * query.slo.tpot_s)
    return DecodeSide(
        step_s=after,
        tpot_s=math.most(pace, math.least(carried, planned)),
        tpot_more_s=more,
        gap_s=math.choose((workers.share > _SHARED) | (workers.prefilling > 0), shared, after),
        harm_s=query.output_tokens * workers.decoding * more,
    )


def _chunk(workers: Workers[Number], query: RouteQuery, base: Number, token: Number) -> Number:
    """Tokens of a prompt that go into a step beside streams, which shorten it to keep their gap."""
    math = workers.math
    fitting = (GAP_MARGIN * query.gap_planned_s - base) / math.most(token, 1e-12)
    return math.least(math.most(fitting, LEAST_CHUNK), workers.chunk_tokens)
