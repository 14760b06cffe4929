"""Text to token ids and back, incrementally and without ever cutting a character in half."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from blake3 import blake3
from tokenizers import Tokenizer, normalizers

from bascule.errors import InvalidRequest, ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
"""How SentencePiece writes a space."""
_NFC_SHRINKS = 8
"""More times than composing characters makes any text shorter in UTF-8."""


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes (GPT-2's `bytes_to_unicode`, inverted).

    Printable bytes stand for themselves, the others take the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_ALPHABET = byte_alphabet()


class TextTokenizer:
    """A model's tokenizer over a `tokenizers.Tokenizer` of the byte-level or the byte-fallback (SentencePiece) kind.

    Text that spells a special token, such as `<|im_end|>`, becomes that token wherever it stands, in a user's message
    too: so do transformers, vLLM and the models' own chat templates.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Whether plain text gets a start token is said by `tokenizer`'s post-processor.

        Raises ModelError for a tokenizer of another kind.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._strips_first_space = "Strip" in kinds
        if not self._byte_level and "ByteFallback" not in kinds:
            raise ModelError(
                f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) is neither byte-level nor byte-fallback;"
                " only those of the Llama family are supported"
            )
        self._bytes: dict[int, bytes] = {}
        self._longest: float | None = None

    @property
    def vocab(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def digest(self) -> str:
        """BLAKE3 (64 hex digits) over all tokens and their ids: where it is equal, ids mean the same text."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return blake3(msgspec.json.encode(sorted(vocabulary.items()))).hexdigest()

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; with `add_bos` the model's own start token first, where the model wants one.

        A rendered chat template writes its start token itself and is encoded with `add_bos=False`. Raises
        InvalidRequest for text that is not valid Unicode (half of a surrogate pair).
        """
        try:
            # As a batch of one: unlike `encode` it lets other threads run, and a long text is several times as fast.
            ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_bos)[0].ids
        except TypeError:  # what the library raises for a string that UTF-8 cannot express
            raise InvalidRequest("the text holds half of a surrogate pair, which is not valid Unicode") from None
        return ids

    def fewest_tokens(self, text: str) -> int:
        """The least that `encode` can find in the text, without encoding it; 0 where that cannot be known."""
        if self._longest is None:
            self._longest = self._longest_token()
        return int(len(text.encode("utf-8", "surrogatepass")) / self._longest)

    def _longest_token(self) -> float:
        """Bytes of text that no token stands for more of."""
        normalizer = self._tokenizer.normalizer
        added = self._tokenizer.get_added_tokens_decoder().values()
        if not isinstance(normalizer, normalizers.NFC | None) or any(token.lstrip or token.rstrip for token in added):
            return math.inf
        return max(map(len, map(self.token_bytes, range(self.vocab)))) * (_NFC_SHRINKS if normalizer else 1)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        detokenizer = Detokenizer(self, skip_special=skip_special)
        text = detokenizer.feed(ids) + detokenizer.flush()
        return text.removeprefix(" ") if self._strips_first_space else text

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, in UTF-8; may be part of a character. Empty for an id without a token."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
        return known

    def token_text(self, token: int) -> str:
        """One token as text, for log probabilities; U+FFFD where it is part of a character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece: str = self._tokenizer.id_to_token(token) or ""
        if not self._byte_level:
            byte = _BYTE_TOKEN.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()
        if all(character in _BYTE_ALPHABET for character in piece):
            return bytes(_BYTE_ALPHABET[character] for character in piece)
        return piece.encode()


class Detokenizer:
    """One stream of tokens to text. What `feed` returns is final; the start of a character is held back until it is
    whole. The text continues a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: TextTokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset[int]()
        self._begun = b""
        """The start of a character."""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these next tokens complete; may be empty."""
        spell = self._tokenizer.token_bytes
        raw = self._begun + b"".join([spell(token) for token in ids if token not in self._hidden])
        text, used = codecs.utf_8_decode(raw, "replace", False)
        self._begun = raw[used:]
        return text

    def flush(self) -> str:
        """What was held back, as U+FFFD, at the end of the stream."""
        begun, self._begun = self._begun, b""
        return begun.decode("utf-8", "replace")


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The types of the tokenizer's decoding steps, in order."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]
