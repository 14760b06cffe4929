"""The model of the first run, pulled for real: its shape, its tokens and its chat format as in transformers."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
from tiny_models import CORPUS
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bascule import models
from bascule.models.gguf_file import GgufFile
from bascule.models.tokenizer import Detokenizer

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|> there"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]


@pytest.fixture(scope="module")
def smollm2() -> models.LoadedModel:
    return models.load("smollm2")


@pytest.fixture(scope="module")
def reference(smollm2: models.LoadedModel) -> PreTrainedTokenizerFast:
    path = smollm2.source.path
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_its_shape(smollm2: models.LoadedModel) -> None:
    spec = smollm2.spec
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.vocab, spec.context, spec.rope_theta) == (49152, 8192, 100000.0)
    assert (spec.tied_embeddings, spec.eos_token_ids, spec.bos_token_id) == (True, (2,), 1)
    assert smollm2.tokenizer.vocab == spec.vocab


def test_its_text_becomes_the_tokens_of_transformers(
    smollm2: models.LoadedModel, reference: PreTrainedTokenizerFast
) -> None:
    for text in (*CORPUS, "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>"):
        ids = smollm2.tokenizer.encode(text)
        assert ids == reference(text).input_ids, text
        assert smollm2.tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_blanks_before_a_digit_stay_one_token(smollm2: models.LoadedModel) -> None:
    """SmolLM2's own tokenizer.json cuts digits out first; transformers' reading of the GGUF file forgets that."""
    tokenizer = smollm2.tokenizer
    assert [tokenizer.token_text(token) for token in tokenizer.encode("a\n\n12")] == ["a", "\n\n", "1", "2"]


def test_its_chat_format_is_that_of_transformers(
    smollm2: models.LoadedModel, reference: PreTrainedTokenizerFast
) -> None:
    assert smollm2.chat_template is not None
    for chat in CHATS:
        text = smollm2.chat_template.render(chat)
        assert text == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        theirs = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert smollm2.tokenizer.encode(text, add_bos=False) == theirs


def test_random_tokens_stream_as_they_decode(smollm2: models.LoadedModel, reference: PreTrainedTokenizerFast) -> None:
    chance = random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(smollm2.spec.vocab) for _ in range(20)]
        stream = Detokenizer(smollm2.tokenizer)
        text = "".join(stream.feed([token]) for token in ids) + stream.flush()
        assert text == reference.backend_tokenizer.decode(ids, skip_special_tokens=True)


def test_its_weights_are_those_that_the_gguf_package_reads(smollm2: models.LoadedModel) -> None:
    ours = GgufFile(smollm2.source.path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.source.path).tensors}
    assert len(ours.tensor_names) == len(theirs) == 272
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
    }
    for name, stored in pairs.items():
        tensor = theirs[stored]
        np.testing.assert_array_equal(ours.tensor(name), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
