"""From steps to what clients see: TTFT and TPOT of aggregated and of disaggregated workers under a closed loop.

`concurrency` clients each send a prompt, wait for its last token and send the next. Rows as in `physics`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bascule.analytic.physics import Array, Efficiency, Worker, step_seconds, streams_that_fit


@dataclass(frozen=True)
class Traffic:
    """What is asked: lengths in tokens, and how many requests are under way at once."""

    prompt: Array
    output: Array
    concurrency: Array


@dataclass(frozen=True)
class Timing:
    """Seconds, and the streams that decode at once on one worker."""

    ttft: Array
    tpot: Array
    prefill: Array
    decode: Array
    streams: Array


def prefill_seconds(worker: Worker, efficiency: Efficiency, prompt: Array, prompts: Array) -> Array:
    """One step that computes `prompts` whole prompts, at least one for each replica of the attention that has work."""
    return step_seconds(worker, efficiency, prompt * prompts, prompts, prompt, prompts * prompt * prompt / 2)


def decode_seconds(worker: Worker, efficiency: Efficiency, streams: Array, context: Array) -> Array:
    """One step that adds a token to each of `streams` sequences of `context` tokens."""
    return step_seconds(worker, efficiency, streams, streams, context, streams * context)


def _mean_context(traffic: Traffic) -> Array:
    return traffic.prompt + traffic.output / 2


def _in_a_step(share: Array, streams: Array) -> Array:
    """Streams that one step of one worker carries, on average, where there are any: at least one."""
    return np.maximum(share, np.minimum(1.0, streams))


def aggregated(worker: Worker, efficiency: Efficiency, traffic: Traffic) -> Timing:
    """One worker that prefills and decodes in the same steps.

    For each output token that a stream waits for, the others bring `streams / output` prompts to compute; `mix` of
    that time is added to the step. A prompt waits for `queue * others ** spread` prefills, and for a place where memory
    does not hold all streams.
    """
    one = np.minimum(worker.dp, np.maximum(1.0, traffic.concurrency))
    fits = streams_that_fit(worker, traffic.prompt + 0.6 * traffic.output)
    streams = np.minimum(traffic.concurrency, fits)
    decode = decode_seconds(worker, efficiency, _in_a_step(streams / worker.pp, streams), _mean_context(traffic))
    prefill = prefill_seconds(worker, efficiency, traffic.prompt, one)
    others = np.maximum(0.0, streams - 1) / one / worker.pp
    tpot = decode + efficiency.mix * others / traffic.output * prefill
    turn = np.maximum(0.0, traffic.concurrency / streams - 1) * traffic.output * tpot
    ttft = efficiency.start + prefill + decode + efficiency.queue * prefill * others**efficiency.spread
    return Timing(ttft + efficiency.crowding * turn, tpot, prefill, decode, streams)


def disaggregated(
    prefill_worker: Worker,
    worker: Worker,
    efficiency: Efficiency,
    traffic: Traffic,
    prefill_workers: Array,
    workers: Array,
) -> Timing:
    """Workers that only prefill, before workers that only decode.

    Where the number of workers is not known (NaN), one decodes, and as many prefill as keep it busy. Prompts leave the
    prefill workers no faster than these compute; what that holds back waits there and does not decode.
    """
    one = np.minimum(prefill_worker.dp, np.maximum(1.0, traffic.concurrency))
    prefill = prefill_seconds(prefill_worker, efficiency, traffic.prompt, one)
    each = prefill / one / prefill_worker.pp
    workers = np.where(np.isnan(workers), 1.0, workers)
    fits = workers * streams_that_fit(worker, traffic.prompt + 0.6 * traffic.output)
    streams = np.minimum(traffic.concurrency, fits)
    matched = np.zeros_like(streams)
    for turn in range(8):
        decode = decode_seconds(
            worker, efficiency, _in_a_step(streams / workers / worker.pp, streams), _mean_context(traffic)
        )
        if turn == 0:
            rate = streams / (traffic.output * decode)
            matched = np.maximum(1.0, rate * each)
        servers = np.where(np.isnan(prefill_workers), matched, prefill_workers)
        rate = np.minimum(traffic.concurrency / (prefill + traffic.output * decode), servers / each)
        streams = np.sqrt(streams * np.clip(rate * traffic.output * decode, 1.0, fits))
    others = np.maximum(0.0, traffic.concurrency - 1) / one / prefill_worker.pp / servers
    held = np.maximum(0.0, traffic.concurrency / rate - prefill - traffic.output * decode)
    ttft = efficiency.start + efficiency.handoff + prefill + efficiency.queue * prefill * others**efficiency.spread
    return Timing(ttft + efficiency.crowding * held, decode, prefill, decode, streams / workers)
