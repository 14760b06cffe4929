"""Tokenisers from GGUF metadata and from tokenizer.json, against transformers; detokenising piece by piece."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CORPUS, llama_tensors, shape_metadata, tokenizer_metadata, trained_vocabulary, write_gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bascule.errors import InvalidRequest, ModelError
from bascule.models.gguf_tokenizer import tokenizer_from_gguf
from bascule.models.hf_directory import ModelDirectory
from bascule.models.tokenizer import Detokenizer, TextTokenizer

WITH_SPECIAL = (*CORPUS, "<|im_start|>user\nhi<|im_end|>", "a<|im_end|><|im_end|> b", "<|im_end", "< |im_end|>")


def reference_for(folder: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """transformers' own tokenizer for a GGUF file with this metadata."""
    vocab = len(metadata["tokenizer.ggml.tokens"])
    write_gguf(folder / "m.gguf", shape_metadata() | metadata, llama_tensors(vocab))
    return AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken"])
def test_byte_level_gguf_tokenizers_agree_with_transformers(tmp_path: Path, pre: str) -> None:
    metadata = tokenizer_metadata(pre)
    ours, theirs = tokenizer_from_gguf(metadata, "m.gguf"), reference_for(tmp_path, metadata)
    assert ours.vocab == len(theirs)
    for text in WITH_SPECIAL:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


def sentencepiece_metadata() -> dict[str, Any]:
    words = ("▁the", "▁quick", "the", "qu", "ick", "▁t", "he", "▁q", "ui", "ck", "▁▁", "▁▁▁▁", "in", "ing", "▁a")
    pieces = (*words, "▁", *"abcdefghijklmnopqrstuvwxyz.,!?'")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_gguf_tokenizers_agree_with_transformers(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    ours, theirs = tokenizer_from_gguf(metadata, "m.gguf"), reference_for(tmp_path, metadata)
    for text in (*CORPUS, "the quick thing", "  the     quick", "<s>the</s>", "thequick<unk>"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ids[0] == 1
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_smollm_vocabularies_cut_digits_before_anything_else() -> None:
    """As SmolLM's own tokenizer.json does: blanks before a digit stay together, a digit never joins a blank."""
    metadata = tokenizer_metadata("smollm")
    text = "a   12\n\n3"
    ours = tokenizer_from_gguf(metadata, "m.gguf")
    pieces = [ours.token_text(token) for token in ours.encode(text)]
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "2", "3"]
    alone = tokenizer_from_gguf(tokenizer_metadata("gpt-2"), "m.gguf")
    parts = ("a   ", "1", "2", "\n\n", "3")
    assert ours.encode(text) == [token for part in parts for token in alone.encode(part)]


def test_qwen_text_is_brought_to_normal_form() -> None:
    ours = tokenizer_from_gguf(tokenizer_metadata("qwen2"), "m.gguf")
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9")


def test_a_start_token_is_added_where_the_file_or_its_kind_says_so() -> None:
    def first(metadata: dict[str, Any]) -> int:
        return tokenizer_from_gguf(metadata, "m.gguf").encode("a")[0]

    assert first(tokenizer_metadata(**{"tokenizer.ggml.add_bos_token": True})) == 1
    assert first(tokenizer_metadata(**{"tokenizer.ggml.add_bos_token": False})) != 1
    silent = tokenizer_metadata("llama-bpe")
    del silent["tokenizer.ggml.add_bos_token"]
    assert first(silent) == 1
    assert tokenizer_from_gguf(silent, "m.gguf").encode("a", add_bos=False)[0] != 1


def test_user_defined_tokens_stay_whole_and_visible() -> None:
    metadata = tokenizer_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think é>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    ours = tokenizer_from_gguf(metadata, "m.gguf")
    token = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert token in ours.encode("a<think é>b")
    assert ours.decode(ours.encode("a<think é>b")) == "a<think é>b"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tokenizer.ggml.model": "t5"}, "kind 't5'; supported are gpt2"),
        ({"tokenizer.ggml.pre": "chameleon"}, "'chameleon'; supported are default, gpt-2, smollm"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.model": "llama"}, "without byte tokens"),
    ],
)
def test_gguf_tokenizers_of_other_kinds_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        tokenizer_from_gguf(tokenizer_metadata() | changes, "m.gguf")


def test_half_a_surrogate_pair_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer_from_gguf(tokenizer_metadata(), "m.gguf").encode("a\ud83d")


BYTE_LEVEL = tokenizer_from_gguf(tokenizer_metadata(), "m.gguf")
LIMITED = {pre: tokenizer_from_gguf(tokenizer_metadata(pre), "m.gguf") for pre in ("gpt-2", "qwen2")}


@settings(max_examples=200, deadline=None)
@given(st.text(), st.randoms(use_true_random=False))
def test_a_stream_gives_the_text_of_the_whole_in_whole_characters(text: str, chance: random.Random) -> None:
    ids = BYTE_LEVEL.encode(text)
    stream, pieces, position = Detokenizer(BYTE_LEVEL), [], 0
    while position < len(ids):
        step = chance.randint(1, 3)
        pieces.append(stream.feed(ids[position : position + step]))
        position += step
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == BYTE_LEVEL.decode(ids)
    assert stream.flush() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab - 1), max_size=20))
def test_any_tokens_decode_as_the_library_decodes_them(ids: list[int]) -> None:
    library = BYTE_LEVEL._tokenizer
    assert BYTE_LEVEL.decode(ids) == library.decode(ids, skip_special_tokens=True)
    assert BYTE_LEVEL.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


def test_part_of_a_character_is_held_back_and_flushed_at_the_end() -> None:
    emoji = BYTE_LEVEL.encode("\U0001f955")
    assert len(emoji) > 1
    stream = Detokenizer(BYTE_LEVEL)
    assert [stream.feed([token]) for token in emoji[:-1]] == [""] * (len(emoji) - 1)
    assert stream.feed(emoji[-1:]) == "\U0001f955"
    assert stream.feed(emoji[:-1]) == ""
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ids = BYTE_LEVEL.encode("a<|im_end|>b")
    assert Detokenizer(BYTE_LEVEL).feed(ids) == "ab"
    assert Detokenizer(BYTE_LEVEL, skip_special=False).feed(ids) == "a<|im_end|>b"
    assert BYTE_LEVEL.special_ids == {0, 1, 2}


def test_a_stream_keeps_the_space_that_joins_it_to_its_prompt() -> None:
    sentencepiece = tokenizer_from_gguf(sentencepiece_metadata(), "m.gguf")
    ids = sentencepiece.encode("the", add_bos=False)
    assert sentencepiece.decode(ids) == "the"
    assert Detokenizer(sentencepiece).feed(ids) == " the"


def test_each_token_has_its_bytes() -> None:
    ids = BYTE_LEVEL.encode("naïve \U0001f955")
    assert b"".join(BYTE_LEVEL.token_bytes(token) for token in ids) == "naïve \U0001f955".encode()
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.vocab + 5) == b""
    assert BYTE_LEVEL.token_text(ids[-1]) == "\ufffd"


def save_directory(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> ModelDirectory:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelDirectory(folder)


def byte_level_library(*, bos: bool = False) -> Tokenizer:
    tokens, merges = trained_vocabulary()
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    library = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    if bos:
        single = "<|im_start|> $A"
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<|im_start|>", 1)])
    return library


@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_directories_follow_transformers_in_adding_a_start_token(
    tmp_path: Path, in_json: bool, flag: bool | None
) -> None:
    config: dict[str, Any] = {"bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if flag is not None:
        config["add_bos_token"] = flag
    ours = save_directory(tmp_path, byte_level_library(bos=in_json), config).tokenizer()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in WITH_SPECIAL:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False).input_ids


def test_tokens_that_only_the_configuration_names_are_added(tmp_path: Path) -> None:
    library = byte_level_library()
    index = library.get_vocab_size()
    token = {"content": "<tool>", "special": True, "normalized": False}
    ours = save_directory(tmp_path, library, {"added_tokens_decoder": {str(index): token}}).tokenizer()
    assert ours.encode("<tool>") == [index]
    assert index in ours.special_ids
    wrong = save_directory(tmp_path, library, {"added_tokens_decoder": {str(index + 7): token}})
    with pytest.raises(ModelError, match=r"'<tool>' is \d+ in tokenizer_config\.json and \d+"):
        wrong.tokenizer()


def test_truncation_set_in_tokenizer_json_is_ignored(tmp_path: Path) -> None:
    library = byte_level_library()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    text = "a text that is rather longer than that"
    assert TextTokenizer(library).decode(save_directory(tmp_path, library, {}).tokenizer().encode(text)) == text


def test_missing_damaged_and_foreign_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*save_pretrained"):
        ModelDirectory(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match=r"cannot read .*tokenizer\.json"):
        ModelDirectory(tmp_path).tokenizer()
    foreign = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    foreign.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"\(WordPiece\) is neither byte-level nor byte-fallback"):
        save_directory(tmp_path, foreign, {}).tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from([1, 30]), st.sampled_from(["gpt-2", "qwen2"]))
def test_no_text_has_fewer_tokens_than_are_said_to_be_the_fewest(text: str, times: int, pre: str) -> None:
    tokenizer = LIMITED[pre]
    assert tokenizer.fewest_tokens(text * times) <= len(tokenizer.encode(text * times))


def test_a_long_text_has_some_tokens_at_least() -> None:
    assert all(tokenizer.fewest_tokens("a" * 10_000) > 0 for tokenizer in LIMITED.values())
