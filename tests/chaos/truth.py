"""The tokens that a request has to get: the mock's, computed alone, in one piece, without a scheduler or a transfer."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bascule.engine.mock import MockRunner, mock_card
from bascule.engine.protocol import Slice
from bascule.kv.arena import Arena
from bascule.types import CostModel, SamplingParams

LAYERS = 16
"""Of the mock's KV: enough for a block to be 4 KiB, so that a prompt takes more than one breath to send."""


def true_tokens(
    context: int, vocab: int, prompt: Sequence[int], sampling: SamplingParams, layers: int = LAYERS
) -> list[int]:
    """All `max_tokens` of them; the mock knows no end token."""
    card = mock_card(context=context, vocab=vocab, layers=layers)
    blocks = list(range(-(-(len(prompt) + sampling.max_tokens) // card.layout.block_size)))
    tokens, computed = list(prompt), 0
    with Arena.create(card.layout, len(blocks)) as arena:
        runner = MockRunner(card, CostModel(), time.sleep)
        runner.bind(arena)
        while len(tokens) < len(prompt) + sampling.max_tokens:
            [drawn] = runner.execute([Slice(tokens[computed:], computed, blocks, sampling, tokens, len(prompt))])
            assert drawn is not None
            computed = len(tokens)
            tokens.append(drawn.token)
    return tokens[len(prompt) :]
