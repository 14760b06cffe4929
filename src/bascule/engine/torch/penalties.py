"""What the tokens so far, `logit_bias` and `min_tokens` do to one row of logits, before temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bascule.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn: how, and after which tokens (prompt, then output)."""

    params: SamplingParams
    history: Sequence[int]
    prompt_tokens: int

    @property
    def position(self) -> int:
        """Number of output tokens before this one."""
        return len(self.history) - self.prompt_tokens

    @property
    def withholds_end(self) -> bool:
        """Whether the output is still too short to end."""
        return self.position < self.params.min_tokens

    @property
    def penalised(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    @property
    def adjusts(self) -> bool:
        """Whether anything but temperature and truncation stands between the model's logits and the draw."""
        return bool(self.params.logit_bias) or self.withholds_end or self.penalised


def adjust(logits: Tensor, draw: Draw, stop_tokens: frozenset[int]) -> None:
    """Change one row [vocab] in place, in vLLM's order: bias, minimum length, repetition, frequency, presence.

    `stop_tokens` are the model's own end tokens. Ids beyond the vocabulary name no token and are passed over.
    """
    params = draw.params
    for token, bias in params.logit_bias:
        if 0 <= token < len(logits):
            logits[token] += bias
    if draw.withholds_end:
        ends = set(params.stop_token_ids) | (frozenset() if params.ignore_eos else stop_tokens)
        logits[[token for token in ends if 0 <= token < len(logits)]] = float("-inf")
    if params.repetition_penalty != 1.0:
        _penalise_repetition(logits, draw)
    if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
        _penalise_output(logits, draw)


def _penalise_repetition(logits: Tensor, draw: Draw) -> None:
    """Divide positive and multiply negative logits of every token seen, in the prompt too (CTRL, section 4.1)."""
    seen = torch.from_numpy(np.unique(draw.history)).to(logits.device)
    values = logits[seen]
    penalty = draw.params.repetition_penalty
    logits[seen] = torch.where(values > 0, values / penalty, values * penalty)


def _penalise_output(logits: Tensor, draw: Draw) -> None:
    """Subtract `count * frequency + presence` from every token of the output (OpenAI's definition)."""
    output = draw.history[draw.prompt_tokens :]
    if output:
        ids, counts = np.unique(output, return_counts=True)
        penalties = counts * draw.params.frequency_penalty + draw.params.presence_penalty
        logits[torch.from_numpy(ids).to(logits.device)] -= torch.from_numpy(penalties).to(logits)
