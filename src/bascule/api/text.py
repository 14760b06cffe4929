"""One output's way from deltas of tokens to pieces of text: detokenised, cut at stop strings, with offsets."""

from __future__ import annotations

from msgspec import Struct

from bascule.api.stops import Scan, StopScanner
from bascule.api.tokens import Tokenizer
from bascule.types import Delta, FinishReason, SamplingParams, TokenLogprobs


class TokenReport(Struct, frozen=True):
    """Log probabilities of one output token, and where its text begins in the output's text (in characters)."""

    token: int
    offset: int
    logprobs: TokenLogprobs


class Piece(Struct, frozen=True, kw_only=True):
    """What one delta adds to an output. `text` may lag behind `tokens`; the last piece, with `finish`, has the rest."""

    text: str
    tokens: tuple[int, ...]
    reports: tuple[TokenReport, ...] = ()
    finish: FinishReason | None = None


class OutputText:
    """The text of one output, built delta by delta.

    An end or stop token counts as a token and has no text, unless `include_stop`; the tokens after one that completes a
    stop string are dropped and count for nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        stops: tuple[str, ...],
        *,
        include_stop: bool,
        echo: str = "",
    ) -> None:
        """`echo` is what the text begins with, before any token's."""
        self._stream = tokenizer.stream()
        self._scanner = StopScanner(stops, include_stop=include_stop) if stops else None
        self._silent = frozenset() if include_stop else frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._echo = echo
        self._offset = len(echo)
        self.tokens = 0
        """Output tokens so far: the usage's completion tokens."""

    def push(self, delta: Delta) -> Piece:
        """Take the next delta. Nothing may be pushed after a piece with `finish`."""
        if delta.finish is None and delta.logprobs is None and self._scanner is None and not self._echo:
            self.tokens += len(delta.tokens)
            text = self._stream.feed(delta.tokens)
            self._offset += len(text)
            return Piece(text=text, tokens=delta.tokens)
        shown, self._echo = [self._echo], ""
        reports: list[TokenReport] = []
        for index, token in enumerate(delta.tokens):
            if delta.logprobs is not None:
                reports.append(TokenReport(token, self._offset, delta.logprobs[index]))
            self.tokens += 1
            ends = delta.finish is FinishReason.STOP and index == len(delta.tokens) - 1
            if ends and token in self._silent:
                break
            scan = self._scan(self._stream.feed((token,)))
            shown.append(scan.text)
            if scan.stopped:
                return Piece(
                    text="".join(shown),
                    tokens=delta.tokens[: index + 1],
                    reports=tuple(reports),
                    finish=FinishReason.STOP,
                )
        finish = delta.finish
        if finish is not None:
            scan = self._scan(self._stream.flush())
            shown.append(scan.text)
            if scan.stopped:
                finish = FinishReason.STOP
            elif self._scanner is not None:
                shown.append(self._scanner.flush())
        return Piece(text="".join(shown), tokens=delta.tokens, reports=tuple(reports), finish=finish)

    def _scan(self, text: str) -> Scan:
        """What of `text` may be shown; before `min_tokens` tokens are out, stop strings do not count."""
        self._offset += len(text)
        if self._scanner is None or self.tokens < self._min_tokens:
            return Scan(text)
        return self._scanner.push(text)
