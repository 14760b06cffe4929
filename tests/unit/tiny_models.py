"""Builders of tiny model files for the tests of `bascule.models`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bascule.models.tokenizer import byte_alphabet

CORPUS = (
    "",
    "a",
    " leading space, and trailing ",
    "Hello, world! I'm sure it's what they'll say; don't you?",
    "naïve café, ünïcödé, Ærøskøbing, Ωμέγα",
    "日本語のテキスト 한국어 中文",
    "مرحبا بالعالم שלום",
    "\U0001f600\U0001f44d\U0001f3fd\U0001f1fa\U0001f1f8 \u2764\ufe0f",
    "def f(x):\n\tif x == 42:\n        return {'a': [1, 2.5]}  # why\n",
    "   many    spaces\n\n\nand\t\ttabs \r\n",
    "In 1969, 3.14159 and 1,000,000 and x86_64.",
    "\x00\x01\x7f",
    "http://example.org/?q=a+b&c=%20#frag",
)
"""Texts of many kinds, all in normal form C."""

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 2, 4, 2, 8, 32, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def trained_vocabulary(texts: Iterable[str] = CORPUS, size: int = 400) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE trained on `texts`, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return tokens, [f"{left} {right}" for left, right in merges]


def tokenizer_metadata(pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` entries of a small byte-level vocabulary."""
    tokens, merges = trained_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **more,
    }


def shape_metadata(architecture: str = "llama", **more: Any) -> dict[str, Any]:
    """The entries of a decoder of the sizes above; keys in `more` are without the architecture's prefix."""
    entries = {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD_DIM,
        **more,
    }
    return {f"{architecture}.{key}": value for key, value in entries.items() if value is not None}


def llama_tensors(vocab: int = 400, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random weights of a llama with tied embeddings, by GGUF name."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    architecture: str = "llama",
    stored: Mapping[str, gguf.GGMLQuantizationType] = {},
) -> Path:
    """Write a GGUF file with the package's own writer; `stored` quantises tensors, all others are F32."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, values in tensors.items():
        kind = stored.get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def tiny_llama_gguf(path: Path, **shape: Any) -> Path:
    """A complete small llama with a byte-level tokenizer and a chat template."""
    tokenizer = tokenizer_metadata()
    tokenizer["tokenizer.chat_template"] = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    vocab = len(tokenizer["tokenizer.ggml.tokens"])
    return write_gguf(path, shape_metadata(**shape) | tokenizer, llama_tensors(vocab))
