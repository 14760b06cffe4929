"""The JSON that answers and chunks of both endpoints share; what differs is an endpoint's `Form`."""

from __future__ import annotations

import math
from typing import Protocol

import msgspec
from msgspec import Struct

from bascule.api.text import Piece
from bascule.types import Brought, StoreHandoff

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

LOWEST_LOGPROB = -9999.0
"""What OpenAI reports for a token that cannot occur; JSON has no minus infinity."""


class Form(Protocol):
    """How one endpoint writes a choice. The fields every choice has (index, finish_reason) are added by `Writer`."""

    id_prefix: str
    answer_object: str
    chunk_object: str

    def opening(self) -> dict[str, object] | None:
        """The choice of a stream's first chunk, before any text; None where there is no such chunk."""
        ...

    def part(self, piece: Piece) -> dict[str, object]:
        """A piece as one of a stream's choices."""
        ...

    def whole(self, piece: Piece) -> dict[str, object]:
        """A whole output as a choice."""
        ...


class Usage(Struct, frozen=True):
    """Token counts; `cached_tokens` are those of the prompt whose KV was found and not computed, `brought` what of it
    came from a tier of the store, or from another worker."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    brought: Brought = Brought()
    handoff: StoreHandoff | None = None
    """What went from prefill to decode by way of the store, if that was the way."""

    def fields(self) -> dict[str, object]:
        brought = {
            "loaded_tokens": self.brought.tokens,
            "loaded_bytes": self.brought.bytes,
            "load_s": self.brought.seconds,
            "spared_s": self.brought.spared_s,
            "handoff": None if self.handoff is None else msgspec.structs.asdict(self.handoff),
        }
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": self.cached_tokens,
                **{name: value for name, value in brought.items() if value},
            },
        }


class Writer:
    """Writes the answer, or the chunks, of one HTTP request; what is the same in every chunk is encoded once."""

    def __init__(self, form: Form, request_id: str, created: int, model: str, *, token_ids: bool, usage: bool) -> None:
        self._form = form
        self._header = {"id": f"{form.id_prefix}{request_id}", "created": created, "model": model}
        self._token_ids = token_ids
        self._chunk_head = b"data: " + _encode({**self._header, "object": form.chunk_object})[:-1] + b',"choices":['
        self._chunk_tail = b'],"usage":null}\n\n' if usage else b"]}\n\n"
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        """By index: what stands before and behind the text of a chunk that has nothing else."""

    def opening(self, index: int) -> bytes:
        """The chunk that opens a choice, or nothing."""
        fields = self._form.opening()
        if fields is None:
            return b""
        return self._chunk_head + _encode({"index": index, **fields, "finish_reason": None}) + self._chunk_tail

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> bytes:
        """One piece of a choice, with the usage so far where given."""
        if usage is None and piece.finish is None and not piece.reports and not self._token_ids:
            before, behind = self._plain.get(index) or self._surroundings(index)
            return before + _encode(piece.text) + behind
        choice = _encode(self._choice(index, piece, self._form.part(piece)))
        tail = self._chunk_tail if usage is None else b'],"usage":' + _encode(usage.fields()) + b"}\n\n"
        return self._chunk_head + choice + tail

    def _surroundings(self, index: int) -> tuple[bytes, bytes]:
        """Encode a chunk whose text is a character that stands nowhere else, and take it apart there."""
        blank = Piece(text="\0", tokens=())
        choice = _encode(self._choice(index, blank, self._form.part(blank)))
        before, behind = choice.split(_encode(blank.text))
        self._plain[index] = self._chunk_head + before, behind + self._chunk_tail
        return self._plain[index]

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk of a stream that was asked for its usage: no choice."""
        return self._chunk_head + b'],"usage":' + _encode(usage.fields()) + b"}\n\n"

    def answer(self, outputs: list[Piece], usage: Usage) -> bytes:
        """The whole answer, `outputs` in the order of their indices."""
        choices = [self._choice(index, piece, self._form.whole(piece)) for index, piece in enumerate(outputs)]
        return _encode(
            {**self._header, "object": self._form.answer_object, "choices": choices, "usage": usage.fields()}
        )

    def _choice(self, index: int, piece: Piece, fields: dict[str, object]) -> dict[str, object]:
        choice: dict[str, object] = {"index": index, **fields, "finish_reason": piece.finish}
        if self._token_ids:
            choice["token_ids"] = piece.tokens
        return choice


def join(pieces: list[Piece]) -> Piece:
    """The pieces of one output as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(token for piece in pieces for token in piece.tokens),
        reports=tuple(report for piece in pieces for report in piece.reports),
        finish=pieces[-1].finish,
    )


def json_logprob(logprob: float) -> float:
    """A log probability that JSON can carry."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
