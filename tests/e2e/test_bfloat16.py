"""bfloat16, the default: close to float32, and where outputs part, the reference was nearly undecided."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.cluster import Cluster, serve
from support.oracle import OUTPUT_TOKENS, Reference

MEAN_DIFFERENCE = 0.05
"""Mean absolute difference of the top token's logprob, in nats."""
NEAR = 1.0
"""A gap of the reference's two best logits that bfloat16's rounding can turn."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("policy", ["single", "disaggregated"])
def test_bfloat16_keeps_the_distribution_and_parts_only_at_near_ties(policy: str, references: list[Reference]) -> None:
    chosen = references[::2] if policy == "single" else references[1::2]
    with serve("smollm2", "--policy", policy) as cluster, ThreadPoolExecutor(8) as pool:
        scored = list(pool.map(lambda one: score(cluster, one.prompt), chosen))
    differences, parted = [], 0
    for one, (tokens, tops) in zip(chosen, scored, strict=True):
        assert len(tokens) == OUTPUT_TOKENS
        position = one.disagreement(tokens)
        alike = OUTPUT_TOKENS if position is None else position + 1
        differences += [abs(ours - theirs) for ours, theirs in zip(tops[:alike], one.tops[:alike], strict=True)]
        if position is not None:
            parted += 1
            assert one.gaps[position] < NEAR, (
                f"prompt of {len(one.prompt)}: parted at a gap of {one.gaps[position]:.3f}"
            )
    mean = sum(differences) / len(differences)
    print(f"{policy}: mean |difference| {mean:.4f} over {len(differences)} positions, {parted} of {len(chosen)} part")
    assert len(differences) > 200 and mean < MEAN_DIFFERENCE


def score(cluster: Cluster, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Output token ids and the best token's logprob at each position."""
    answer = cluster.complete(prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=1)["choices"][0]
    return answer["token_ids"], [max(top.values()) for top in answer["logprobs"]["top_logprobs"]]
