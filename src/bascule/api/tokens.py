"""What the api needs of a model's text side, and how it gets that from `bascule.models`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from bascule.errors import InvalidRequest
from bascule.models.chat import ChatTemplate, require_template
from bascule.models.tokenizer import Detokenizer, TextTokenizer


class Message(Struct, frozen=True):
    """One turn of a chat in plain text."""

    role: str
    content: str


class TokenStream(Protocol):
    """Turns one output's tokens into text as they come; what it has returned never changes."""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that has become final with these tokens: empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What was held back, at the end: incomplete characters, as U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back. The methods may be called from any thread."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the model wants before it.

        Raises InvalidRequest for a text far too long for the model's context, before it is tokenised.
        """
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to where the assistant speaks.

        Raises InvalidRequest where the model has no chat template or its template refuses the messages, and like
        `encode`.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence, special tokens left out."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for in UTF-8; it need not be whole characters."""
        ...

    def stream(self) -> TokenStream:
        """A new stream, for one output."""
        ...


class ModelTokenizer:
    """The `Tokenizer` of a loaded model."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, model: str, context: int) -> None:
        """`model` is the name that messages call the model by, `context` its most tokens.

        Looks through the whole vocabulary, which takes some 0.1 s: else the first request would, in the event loop.
        """
        self._tokenizer = tokenizer
        tokenizer.fewest_tokens("")
        self._template = template
        self._model = model
        self._context = context

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        template = require_template(self._template, self._model)
        text = template.render([{"role": message.role, "content": message.content} for message in messages])
        return self._encode(text, add_bos=False)

    def _encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        if (fewest := self._tokenizer.fewest_tokens(text)) > self._context:
            raise InvalidRequest(
                f"This model's context is {self._context} tokens, but the text of {len(text)} characters has at least "
                f"{fewest}. Shorten the prompt.",
                code="context_length_exceeded",
            )
        return self._tokenizer.encode(text, add_bos=add_bos)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(ids)

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)

    def stream(self) -> TokenStream:
        return Detokenizer(self._tokenizer)
