"""An attached server's chunks as tokens of ours: every count, id and end is checked before a token goes on."""

from __future__ import annotations

import math
import re

from msgspec import UNSET

from bascule.router.attached.exchange import Choice, Chunk, Logprobs, Trouble, Usage
from bascule.types import FinishReason, SamplingParams, TokenLogprobs
from bascule.wire import Submit, TokenItem

_LOWEST_LOGPROB = -9999.0
"""What OpenAI-compatible servers report for a token that cannot occur; JSON has no minus infinity."""

_HIGHEST_LOGPROB = 0.01
"""A probability is at most 1; the rest is for servers that compute in 16 bits."""

_NAMED = re.compile(r"token_id:([0-9]{1,18})")


class Output:
    """The output of one submission.

    Which token is the last, and why, follows from the request alone, as it does in our own engine. The server has to
    agree; the last token is held back until it does, for after it nothing can be put right.
    """

    def __init__(self, submission: Submit, vocab: int, end_tokens: frozenset[int]) -> None:
        """`end_tokens`: what ends this output, from `ends_of`."""
        self._submission = submission
        self._vocab = vocab
        self._ends = end_tokens
        self._sent = [*submission.prompt, *submission.generated]
        self._next = len(submission.generated)
        self._cached = 0
        self._last: TokenItem | None = None
        self._agreed = False

    def take(self, chunk: Chunk) -> list[TokenItem]:
        """The tokens that a chunk brings, the output's last one excepted; raises Trouble for what cannot be right."""
        items: list[TokenItem] = []
        before = self._next
        if chunk.usage is not None:
            self._note_cached(chunk.usage)
        for choice in chunk.choices if chunk.choices is not UNSET else ():
            items += self._take_choice(choice)
        if chunk.usage is not None:
            self._check_counts(chunk.usage)
        elif self._next > before:
            raise Trouble("does not count its tokens in each chunk (continuous_usage_stats)", doubt=True)
        return items

    def end(self) -> TokenItem:
        """The stream is over: the last token. Raises Trouble where the output had not come to its end."""
        if self._last is None or not self._agreed:
            raise Trouble(f"ended the stream after {self._next} tokens without finishing the output")
        return self._last

    def _take_choice(self, choice: Choice) -> list[TokenItem]:
        if choice.index != 0:
            raise Trouble(f"sent choice {choice.index}, where one was asked for", doubt=True)
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != self._sent:
            raise Trouble("read another prompt than the token ids that were sent", doubt=True)
        if choice.token_ids is None and choice.text:
            raise Trouble("sends no token ids (return_token_ids), which nothing can stand in for", doubt=True)
        tokens = choice.token_ids or []
        logprobs = self._logprobs(choice.logprobs, tokens)
        items = [
            self._item(token, logprobs[index] if logprobs is not None else None) for index, token in enumerate(tokens)
        ]
        if choice.finish_reason is not None:
            self._agree(choice.finish_reason)
        return items[:-1] if items and items[-1] is self._last else items

    def _item(self, token: int, logprobs: TokenLogprobs | None) -> TokenItem:
        if self._last is not None:
            raise Trouble(f"went on after token {self._last.token}, which ends the output ({self._end})", doubt=True)
        submission = self._submission
        finish = self._finish(self._known(token))
        item = TokenItem(submission.request, submission.attempt, self._next, token, self._cached, finish, logprobs)
        self._next += 1
        if finish is not None:
            self._last = item
        return item

    def _finish(self, token: int) -> FinishReason | None:
        """Whether the token at the next position is the output's last: the rule of our own engine."""
        sampling = self._submission.sampling
        if token in self._ends and self._next >= sampling.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._next + 1 >= sampling.max_tokens else None

    @property
    def _end(self) -> str:
        return "none" if self._last is None or self._last.finish is None else self._last.finish.value

    def _agree(self, reason: str) -> None:
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise Trouble(f"gave the output up with finish_reason {reason[:40]!r}")
        if self._last is None:
            raise Trouble(
                f"ended the output ({reason}) after {self._next} tokens, where nothing in the request or the model ends"
                " it; compare its --max-model-len, its generation config and its end tokens with this model's",
                doubt=True,
            )
        self._agreed = True

    def _note_cached(self, usage: Usage) -> None:
        if usage.prompt_tokens_details is not None:
            cached = usage.prompt_tokens_details.cached_tokens or 0
            self._cached = min(max(cached, 0), len(self._submission.prompt))

    def _check_counts(self, usage: Usage) -> None:
        if usage.prompt_tokens != len(self._sent):
            raise Trouble(f"counts {usage.prompt_tokens} prompt tokens, where {len(self._sent)} were sent", doubt=True)
        drawn = self._next - len(self._submission.generated)
        if usage.completion_tokens != drawn:
            raise Trouble(f"counts {usage.completion_tokens} output tokens, but has sent {drawn}", doubt=True)

    def _logprobs(self, given: Logprobs | None, tokens: list[int]) -> list[TokenLogprobs] | None:
        """One for each token where asked for; raises Trouble where they do not fit the tokens."""
        wanted = self._submission.sampling.logprobs
        if wanted is None or not tokens:
            return None
        tops = given.top_logprobs if given is not None and given.top_logprobs is not None else [None] * len(tokens)
        if given is None or not len(given.tokens) == len(given.token_logprobs) == len(tops) == len(tokens):
            raise Trouble("sent tokens without their log probabilities", doubt=True)
        if [self._token_of(name) for name in given.tokens] != tokens:
            raise Trouble("sent log probabilities of other tokens than those it drew", doubt=True)
        found = []
        for logprob, top in zip(given.token_logprobs, tops, strict=True):
            others = [(self._token_of(name), _logprob(one)) for name, one in (top or {}).items()]
            best = sorted(others, key=lambda e: -e[1])
            if len(best) < wanted:
                raise Trouble(f"sent {len(best)} log probabilities, where {wanted} were asked for", doubt=True)
            found.append(TokenLogprobs(_logprob(logprob), tuple(best[:wanted])))
        return found

    def _token_of(self, name: str) -> int:
        if (named := _NAMED.fullmatch(name)) is None:
            raise Trouble(
                "names tokens in log probabilities by their text (it does not know return_tokens_as_token_ids), and"
                " texts do not tell tokens apart; leave logprobs out, or attach a server that knows it",
                unfit="logprobs",
            )
        return self._known(int(named[1]))

    def _known(self, token: int) -> int:
        if not 0 <= token < self._vocab:
            raise Trouble(f"sent token {token}, but the vocabulary has {self._vocab}", doubt=True)
        return token


def ends_of(sampling: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """The tokens that end an output, the model's own among them unless the request ignores those."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)


def _logprob(given: float) -> float:
    if given > _HIGHEST_LOGPROB:
        raise Trouble(
            f"sent {given:g} as a log probability, which is never above 0; leave logprobs out, or see that server's "
            "settings (vLLM: --logprobs-mode)",
            unfit="logprobs",
        )
    return min(given, 0.0) if given > _LOWEST_LOGPROB else -math.inf
