"""Greedy float32 outputs equal transformers' token for token, however a request is served.

`make test` covers each layout, chunk size, state of the cache and batch, with a share of the prompts each; `make
test-all` runs all combinations with all prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.cluster import Cluster, serve
from support.oracle import LENGTHS, LONG_OUTPUT_TOKENS, OUTPUT_TOKENS, Reference

LAYOUTS = {
    "single": ["--policy", "single"],
    "replicated": ["--policy", "replicated"],
    "shm": ["--policy", "disaggregated", "--transfer", "shm"],
    "tcp": ["--policy", "disaggregated", "--transfer", "tcp"],
}
CHUNKS = {"64": 64, "512": 512, "whole": 2048}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "presence_penalty": 0.3, "max_tokens": 32}


def flags(layout: str, chunk: str) -> list[str]:
    """Nothing but the chunk size cuts prompts: bounds that float32 cannot keep would cut them all to the least."""
    size = str(CHUNKS[chunk])
    unbound = ["--slo-tpot", "inf", "--slo-gap", "inf"]
    return [*LAYOUTS[layout], "--dtype", "float32", "--chunk-tokens", size, "--step-tokens", size, *unbound]


def complete_all(cluster: Cluster, prompts: Sequence[list[int]], batch: int, **fields: Any) -> list[list[int]]:
    """Token ids of each prompt's output, `batch` requests at a time."""

    def one(prompt: list[int]) -> list[int]:
        answer = cluster.complete(prompt, **({"max_tokens": OUTPUT_TOKENS, "ignore_eos": True} | fields))
        expected = "remote" if "disaggregated" in cluster.process.args else "local"  # type: ignore[operator]
        assert answer["route"].startswith(expected), answer["route"]
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    with ThreadPoolExecutor(batch) as pool:
        return list(pool.map(one, prompts))


def check_pass(
    cluster: Cluster, references: Sequence[Reference], batch: int, warm: bool, where: str, tokens: int = OUTPUT_TOKENS
) -> int:
    """One pass over the prompts; a warm one finds in the cache what an earlier pass left there."""
    before = hit_tokens(cluster)
    outputs = complete_all(cluster, [one.prompt for one in references], batch, max_tokens=tokens)
    exceptions = sum(one.check(output, where, tokens) for one, output in zip(references, outputs, strict=True))
    cluster.wait_idle()
    if warm:
        assert hit_tokens(cluster) > before, f"{where}: the cache was meant to be warm"
    return exceptions


def hit_tokens(cluster: Cluster) -> int:
    text = cluster.http.get(f"{cluster.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("bascule_kv_hit_tokens_total")]
    return int(sum(float(line.split()[-1]) for line in lines))


def share(index: int) -> slice:
    """A third of the prompts, long and short."""
    return slice(index % 3, len(LENGTHS), 3)


CELLS = list(itertools.product(LAYOUTS, CHUNKS))
_SHORT = {("single", "whole"), ("replicated", "64"), ("shm", "64"), ("shm", "512"), ("tcp", "whole")}
SHORT = [pytest.param(*cell, marks=() if cell in _SHORT else pytest.mark.full) for cell in CELLS]


SAMPLED_SHARE = slice(1, len(LENGTHS), 6)
"""Prompts, short and long, of which the servers of `SAMPLED_WITH` have met none when they are asked for samples."""
SAMPLED_WITH = {"single": "whole", "replicated": "64", "shm": "64", "tcp": "whole"}


class Samples:
    """Seeded samples by layout, one at a time from the undivided server and all at once from the others.

    They are taken while a server is up that other tests need anyway.
    """

    def __init__(self, references: Sequence[Reference]) -> None:
        self._prompts = [one.prompt for one in references[SAMPLED_SHARE]]
        self._found: dict[str, list[list[int]]] = {}

    def take(self, cluster: Cluster, layout: str, chunk: str) -> None:
        if SAMPLED_WITH[layout] == chunk:
            batch = 1 if layout == "single" else 16
            self._found[layout] = complete_all(cluster, self._prompts, batch, **SAMPLED)
            cluster.wait_idle()

    def of(self, layout: str) -> list[list[int]]:
        """From a server of their own if need be."""
        if layout not in self._found:
            with serve("smollm2", *flags(layout, SAMPLED_WITH[layout])) as cluster:
                self.take(cluster, layout, SAMPLED_WITH[layout])
        return self._found[layout]


@pytest.fixture(scope="module")
def samples(references: list[Reference]) -> Samples:
    return Samples(references)


@pytest.mark.parametrize(("layout", "chunk"), SHORT)
def test_greedy_outputs_equal_transformers(
    layout: str, chunk: str, references: list[Reference], samples: Samples
) -> None:
    """Cold and warm cache, batches of 1 and 16, alternating so that all pairs of settings occur."""
    layout_index, chunk_index = list(LAYOUTS).index(layout), list(CHUNKS).index(chunk)
    batches = (16, 1) if (layout_index + chunk_index) % 2 else (1, 16)
    chosen, where = references[share(chunk_index)], f"{layout} {chunk}"
    # One at a time costs a float32 step per token: a medium and a long prompt do there. The full form has all tokens.
    # Idle replicas take turns, so each twice in a row meets both workers' caches.
    repeats = 2 if layout == "replicated" else 1
    passes = {16: chosen, 1: [one for one in (chosen[3], chosen[-2]) for _ in range(repeats)]}
    tokens = {16: OUTPUT_TOKENS, 1: OUTPUT_TOKENS // 2}
    with serve("smollm2", *flags(layout, chunk)) as cluster:
        for batch, state in zip(batches, ("cold", "warm"), strict=True):
            check_pass(cluster, passes[batch], batch, state == "warm", f"{where} {state}", tokens[batch])
        samples.take(cluster, layout, chunk)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "chunk"), CELLS)
@pytest.mark.parametrize("batch", [1, 16])
def test_greedy_outputs_equal_transformers_in_all_combinations(
    layout: str, chunk: str, batch: int, long_references: list[Reference]
) -> None:
    with serve("smollm2", *flags(layout, chunk)) as cluster:
        exceptions = sum(
            check_pass(
                cluster, long_references, batch, warm, f"{layout} {chunk} {batch} warm: {warm}", LONG_OUTPUT_TOKENS
            )
            for warm in (False, True)
        )
    print(f"{layout} {chunk} batch {batch}: {exceptions} near ties")


@pytest.mark.parametrize("layout", ["replicated", "shm", "tcp"])
def test_seeded_samples_are_the_same_however_they_are_served(
    layout: str, samples: Samples, references: list[Reference]
) -> None:
    assert samples.of(layout) == samples.of("single")
    greedy = [one.output[:32] for one in references[SAMPLED_SHARE]]
    assert any(ours != theirs for ours, theirs in zip(samples.of(layout), greedy, strict=True)), (
        "the samples are greedy"
    )
