"""Token ids for the requests of a trace, which has none: equal blocks get equal tokens, so that reuse is real."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from bascule.errors import ConfigError
from bascule.traffic.traces import TraceRequest
from bascule.traffic.workloads import VOCABULARY, Ask, Talk


def trace_talks(requests: Iterable[TraceRequest], seed: int, vocabulary: range = VOCABULARY) -> Iterator[Talk]:
    """The requests with tokens, each at its time; made one by one, as those of a long trace do not fit into memory.

    The n-th request's own tokens, behind or without named blocks, hang on `seed` and n.
    """
    for number, request in enumerate(requests):
        yield Talk((Ask(prompt_of(request, number, seed, vocabulary), request.output_tokens),), request.at)


def prompt_of(request: TraceRequest, number: int, seed: int, vocabulary: range = VOCABULARY) -> tuple[int, ...]:
    """`request.prompt_tokens` token ids; a block's hang on its name, `seed` and the vocabulary only."""
    size = request.block_tokens
    parts = [_tokens(size, vocabulary, "block", seed, size, name) for name in request.hash_ids]
    parts.append(_tokens(max(0, request.prompt_tokens - size * len(parts)), vocabulary, "own", seed, number))
    return tuple(np.concatenate(parts)[: request.prompt_tokens].tolist())


def vocabulary_of(text: str) -> range:
    """`LOW:HIGH`, the ids from LOW to below HIGH; raises ConfigError."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) <= 1 << 31):
        raise ConfigError(f"a vocabulary of {text!r} is not possible; write LOW:HIGH, for example 1000:30000")
    return range(int(low), int(high))


def _tokens(count: int, vocabulary: range, *key: object) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`count` ids that follow from the key alone, on every machine and in every version."""
    drawn = np.frombuffer(hashlib.shake_128(repr(key).encode()).digest(4 * count), dtype="<u4")
    return vocabulary.start + drawn.astype(np.int64) % len(vocabulary)
