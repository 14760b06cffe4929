"""What transformers says: greedy outputs of the embedded model in float32, and how sure it was of each token."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NEAR_TIE = 1e-4
"""Where the reference's two best logits are closer than this, either is right (docs/architecture.md, "Exactness")."""
OUTPUT_TOKENS = 32
LONG_OUTPUT_TOKENS = 64
"""In the exhaustive forms."""
LENGTHS = (5, 9, 15, 16, 17, 31, 33, 64, 65, 100, 128, 200, 257, 333, 400, 511, 513, 700, 1024, 1500)


@dataclass(frozen=True)
class Reference:
    """A prompt, the reference's greedy continuation, and at each of its positions how sure the reference was."""

    prompt: list[int]
    output: list[int]
    gaps: list[float]
    """Of the two best logits."""
    tops: list[float]
    """The best token's logprob."""

    def disagreement(self, output: list[int]) -> int | None:
        """The first position at which an output, which may be the shorter one, differs, or None."""
        pairs = enumerate(zip(output, self.output, strict=False))
        return next((position for position, (ours, theirs) in pairs if ours != theirs), None)

    def check(self, output: list[int], where: str, tokens: int = OUTPUT_TOKENS) -> int:
        """Fail unless there are so many tokens, equal up to a near tie; returns 1 for such an exception, else 0."""
        assert len(output) == tokens, where
        position = self.disagreement(output)
        if position is None:
            return 0
        gap = self.gaps[position]
        message = f"{where}: prompt of {len(self.prompt)} tokens differs at output {position}, reference gap {gap:.2e}"
        assert gap < NEAR_TIE, message
        print("near tie:", message)
        return 1


def long_text() -> str:
    """Real English prose that every checkout has."""
    return Path(__file__).parents[2].joinpath("LICENSE").read_text()


def prompts(encode: Any) -> list[list[int]]:
    """One prompt of each of `LENGTHS`, starting at different places of the text."""
    tokens = encode(long_text())
    starts = [(37 * index) % (len(tokens) - max(LENGTHS)) for index in range(len(LENGTHS))]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def kept(config: pytest.Config, name: str, question: Any, make: Callable[[], Any]) -> Any:
    """What `make` says to `question`, asked once and then kept in pytest's cache between runs; both go into JSON.

    A process that wants it while another one makes it waits for that.
    """
    if config.cache is None:
        return make()
    key = f"bascule/{name}"
    with config.cache.mkdir("bascule-locks").joinpath(name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = config.cache.get(key, None)
        if found is None or found["question"] != question:
            found = {"question": question, "answer": make()}
            config.cache.set(key, found)
    return found["answer"]


@cache
def reference_model(gguf: Path, dtype: str) -> Any:
    """The embedded model as transformers loads it, its 4-bit weights dequantised to `dtype`; loaded once."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )


def generate(model: Any, prompt: list[int], tokens: int = OUTPUT_TOKENS) -> Reference:
    """transformers' own greedy `generate`, which does not stop at end tokens."""
    import torch

    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].float().topk(2).values for logits in result.logits]
    return Reference(
        prompt=prompt,
        output=result.sequences[0, len(prompt) :].tolist(),
        gaps=[float(top[0] - top[1]) for top in best],
        tops=[float(logits[0].float().log_softmax(-1).max()) for logits in result.logits],
    )
