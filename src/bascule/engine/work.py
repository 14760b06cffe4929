"""What goes into an engine, and what comes out of it: requests, their tokens, and how far their KV has come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from bascule.errors import InvalidRequest
from bascule.types import FinishReason, ModelCard, RequestId, Salt, SamplingParams, Slo, TokenLogprobs


class Work(Struct, frozen=True, kw_only=True):
    """A request for an engine. `generated` are output tokens the client already has: they are computed, not drawn."""

    request: RequestId
    attempt: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    generated: tuple[int, ...] = ()
    handoff: bool = False
    """Prefill here, decode elsewhere."""
    slo: Slo | None = None
    """None for the engine's own."""
    salt: Salt = b""
    """Only what has the same shares KV with it."""
    priority: int = 0
    """Lower goes first, and keeps its blocks longest."""


class Key(NamedTuple):
    """What names a sequence: a request that is placed again is another sequence."""

    request: RequestId
    attempt: int


class Output(Struct, frozen=True, kw_only=True):
    """One drawn token. `position` counts output tokens from 0; `finish` is set on a request's last."""

    request: RequestId
    attempt: int
    position: int
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache, when the sequence was first admitted or later."""


class Progress(Struct, frozen=True, kw_only=True):
    """A handoff's KV after one more chunk: the first `computed` tokens' lies in `blocks`, and in the arena's bytes."""

    request: RequestId
    attempt: int
    blocks: tuple[int, ...]
    """The sequence's block table from position 0 on; it may reach beyond `computed`."""
    computed: int
    last: bool
    """The whole prompt is computed; the first token is in the same step's outputs."""


class Found(Struct, frozen=True, kw_only=True):
    """Blocks of a sequence's prompt that were in the prefix cache, so that it need not compute them."""

    request: RequestId
    attempt: int
    places: range
    """Of its block table."""
    tokens: int
    """Of the prompt, in those blocks."""
    prompt_tokens: int
    """Of the whole prompt."""

    def tokens_at(self, places: Iterable[int], block_size: int) -> int:
        """Those of the prompt in the blocks at some places."""
        return sum(min(max(self.prompt_tokens - place * block_size, 0), block_size) for place in places)


class Admitted(Struct, frozen=True, kw_only=True):
    """A sequence that was to find more in the cache than it did when it got blocks, or that had given its blocks up."""

    request: RequestId
    attempt: int
    tokens: tuple[int, ...]
    """All that are known of it."""
    salt: Salt
    held: bool
    """It is not computed before `Engine.go`."""


class Failure(Struct, frozen=True, kw_only=True):
    """A sequence that is gone because its step failed."""

    request: RequestId
    attempt: int
    message: str


class StepResult(Struct, frozen=True, kw_only=True):
    """What one step brought; `executed` is False where there was nothing to run."""

    outputs: list[Output] = []
    progress: list[Progress] = []
    """Handoffs that came further. One whose request ended with its first token is gone and not among them."""
    failed: list[Failure] = []
    found: list[Found] = []
    """What sequences found in the prefix cache before this step, and did not compute."""
    admitted: list[Admitted] = []
    """Sequences that got blocks with this step, and lack KV that a store may have."""
    computed_tokens: int = 0
    """Of prompts, that it computed."""
    executed: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing ran, and nothing has changed for anybody."""
        return not (self.executed or self.found or self.admitted)


class UnderWay(Struct, frozen=True):
    """The step that is being computed."""

    steps: int
    """How many were begun before it."""
    sequences: int
    expected_s: float
    """What the cost model says that it takes; 0 where that knows nothing."""


class EngineLoad(Struct, frozen=True):
    running: int
    """Sequences that hold blocks, paused and parked handoffs among them."""
    waiting: int
    prefilling: int
    """Sequences whose prompt is not computed."""
    backlog_tokens: int
    """Their tokens still to be computed."""
    streams: int
    """Sequences that decode."""
    context_tokens: int
    """Tokens of context of these."""
    slack_s: float | None
    """What prompts may take from these at once; see `policies.batch.slack_seconds`."""


def check_fits(work: Work, card: ModelCard, capacity: int) -> None:
    """Raises InvalidRequest for what the model, or a KV memory of `capacity` tokens, could never take."""
    total = len(work.prompt) + work.sampling.max_tokens
    asked = f"{len(work.prompt)} prompt tokens and {work.sampling.max_tokens} output tokens"
    if not work.prompt:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    biased = [token for token, _ in work.sampling.logit_bias]
    _check_known((*work.prompt, *work.generated, *work.sampling.stop_token_ids, *biased), card.vocab)
    if len(work.generated) >= work.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(work.generated)} of {work.sampling.max_tokens} output tokens are there already; ask for more",
            param="max_tokens",
        )
    if total > card.context:
        raise InvalidRequest(
            f"{asked} are {total}, but the model's context is {card.context} tokens; shorten the prompt or max_tokens",
            code="context_length_exceeded",
        )
    if total > capacity:
        raise InvalidRequest(
            f"{asked} are {total}, but this worker's KV memory holds {capacity} tokens; "
            "shorten them or give the worker more KV memory",
            code="context_length_exceeded",
        )


def _check_known(tokens: tuple[int, ...], vocab: int) -> None:
    if max(tokens) >= vocab or min(tokens) < 0:
        raise InvalidRequest(
            f"the prompt has token {max(tokens)}, but the model's vocabulary ends at {vocab - 1}; "
            "its tokenizer has tokens that the model does not know",
            param="prompt",
        )
