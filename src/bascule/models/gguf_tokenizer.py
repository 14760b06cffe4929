"""Building a tokenizer from the vocabulary, merges or scores in a GGUF file's metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bascule.errors import ModelError
from bascule.models.chat import ChatTemplate
from bascule.models.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class _TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as far as it matters here."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


class _Form(Struct, frozen=True, kw_only=True):
    """How a byte-level vocabulary wants its text cut before merging, as in the models' own tokenizer.json files."""

    split: str | None = None
    """None is GPT-2's pattern, which the byte-level step brings itself."""
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    """A word that is in the vocabulary is one token, whatever the merges say."""
    bos: bool = False
    """Start token where the file does not say."""


_LLAMA3 = _Form(split=_LLAMA3_SPLIT, whole_words=True, bos=True)
_QWEN2 = _Form(split=_QWEN2_SPLIT, nfc=True)
_GPT2 = _Form()
_FORMS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _Form(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Form(split=_TEKKEN_SPLIT, whole_words=True, bos=True),
}
"""By `tokenizer.ggml.pre`."""


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: str) -> TextTokenizer:
    """Build the tokenizer that the metadata of the GGUF file `where` describes.

    Raises ModelError for a kind of tokenizer that cannot be rebuilt faithfully.
    """
    entries = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if not entries.get("tokens"):
        raise ModelError(f"{where} holds no vocabulary (tokenizer.ggml.tokens)")
    match entries.get("model"):
        case "gpt2":
            form = _form(entries, where)
            tokenizer, bos_by_default = _byte_level(entries, form), form.bos
        case "llama":
            tokenizer, bos_by_default = _sentencepiece(entries, where), True
        case other:
            raise ModelError(f"{where} has a tokenizer of kind {other!r}; supported are gpt2 (byte-level) and llama")
    _add_marked_tokens(tokenizer, entries)
    bos = entries.get("bos_token_id")
    if bos is not None and entries.get("add_bos_token", bos_by_default):
        start = entries["tokens"][bos]
        tokenizer.post_processor = processors.TemplateProcessing(single=[start, "$A"], special_tokens=[(start, bos)])
    return TextTokenizer(tokenizer)


def chat_template_from_gguf(metadata: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template that the metadata of a GGUF file holds, None if it holds none."""
    template = metadata.get("tokenizer.chat_template")
    if not template:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TEMPLATE_TOKENS.items()}
    return ChatTemplate(template, {name: tokens[index] for name, index in ids.items() if index is not None})


def _form(entries: Mapping[str, Any], where: str) -> _Form:
    name = entries.get("pre", "default")
    if name == "default":
        logger.warning("%s does not say how its text is to be split; GPT-2's way is used", where)
    if name not in _FORMS:
        raise ModelError(f"{where} splits text in the way {name!r}; supported are {', '.join(_FORMS)}")
    return _FORMS[name]


def _byte_level(entries: Mapping[str, Any], form: _Form) -> Tokenizer:
    merges = [_pair(merge) for merge in entries.get("merges", ())]
    model = models.BPE(vocab=_vocabulary(entries["tokens"]), merges=merges, ignore_merges=form.whole_words)
    tokenizer = Tokenizer(model)
    if form.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if form.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if form.split is not None:
        steps.append(pre_tokenizers.Split(Regex(form.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=form.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(entries: Mapping[str, Any], where: str) -> Tokenizer:
    """SentencePiece BPE with byte fallback, spelled as merges in the way of Llama 2's tokenizer.json."""
    vocabulary = _vocabulary(entries["tokens"])
    if "<0x00>" not in vocabulary:
        raise ModelError(f"{where} has a SentencePiece vocabulary without byte tokens, which is not supported")
    if "merges" in entries:
        merges = [_pair(merge) for merge in entries["merges"]]
    elif len(entries.get("scores", ())) == len(entries["tokens"]):
        merges = merges_from_scores(vocabulary, dict(zip(entries["tokens"], entries["scores"], strict=True)))
    else:
        raise ModelError(f"{where} has a SentencePiece vocabulary without scores or merges")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    prefix_space = entries.get("add_space_prefix", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix_space else "never", split=False)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: every cut of a token into two tokens, best score first.

    Cuts of one score are ordered by the lengths of their parts, longest left part first, and then by token ids.
    """
    cuts: list[tuple[str, str, float]] = []
    for token, score in scores.items():
        parts = ((token[:index], token[index:]) for index in range(1, len(token)))
        known = [(left, right, score) for left, right in parts if left in vocabulary and right in vocabulary]
        cuts += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    cuts.sort(key=lambda cut: (cut[2], len(cut[0]), len(cut[1])), reverse=True)
    return [(left, right) for left, right, _ in cuts]


def _add_marked_tokens(tokenizer: Tokenizer, entries: Mapping[str, Any]) -> None:
    """Have control tokens and user-defined tokens found whole in the text; the latter are not special."""
    marked = list(zip(entries["tokens"], entries.get("token_type", ()), strict=False))
    control = [token for token, kind in marked if kind in (_TokenType.UNKNOWN, _TokenType.CONTROL)]
    user_defined = [token for token, kind in marked if kind == _TokenType.USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
