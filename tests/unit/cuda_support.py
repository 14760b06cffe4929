"""Where the tests of the GPU's path compute, and tiny models for it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch_support import LLAMA3_ROPE, save_random

from bascule.engine.protocol import Slice
from bascule.engine.torch.cuda.decoder import CudaDecoder
from bascule.engine.torch.cuda.launch import Chunks
from bascule.engine.torch.model import Decoder
from bascule.engine.torch.plan import Forward, plan_step
from bascule.engine.torch.weights import load_weights
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve
from bascule.models.spec import ModelSpec
from bascule.types import SamplingParams

DEVICE = torch.device(os.environ.get("BASCULE_TEST_DEVICE", "cpu"))
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
"""Triton's interpreter cannot multiply bfloat16."""
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
BLOCK = 8
BLOCKS = 40
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3-untied": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama-all-biases-no-gqa": (
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
    "qwen2-one-key-head": (transformers.Qwen2Config, {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen3-normed-heads": (transformers.Qwen3Config, {"head_dim": 32}),
}


def saved(name: str, directory: Path) -> ModelSpec:
    config_class, changes = MODELS[name]
    save_random(config_class(**(SHAPE | changes)), directory, seed=11, vectors=0.2, matrices=0.2)
    return ModelDirectory(directory).spec()


def weights(spec: ModelSpec, directory: Path) -> dict[str, Tensor]:
    loaded = load_weights(spec, resolve(str(directory)), DTYPE)
    return {name: weight.to(DEVICE) for name, weight in loaded.items()}


def plain(spec: ModelSpec, directory: Path) -> Decoder:
    return Decoder(spec, weights(spec, directory))


def by_kernels(spec: ModelSpec, directory: Path, **more: Any) -> CudaDecoder:
    """In small tiles: a chunk then has several, and the interpreter less to do."""
    return CudaDecoder(spec, weights(spec, directory), processors=4, chunks=Chunks(32, 32), **more)


def memory(spec: ModelSpec, blocks: int = BLOCKS) -> Tensor:
    """KV memory that is not-a-number wherever nobody has written."""
    shape = (2 * spec.layers, blocks * BLOCK, spec.kv_heads, spec.head_dim)
    return torch.full(shape, float("nan"), dtype=DTYPE, device=DEVICE)


@torch.inference_mode()
def logits(
    decoder: Forward, spec: ModelSpec, kv: Tensor, steps: Sequence[Sequence[int]], draws: bool = True
) -> Iterator[Tensor]:
    """After every step of `steps`, which are tokens for each of up to four sequences in shuffled blocks."""
    order = random.Random(3).sample(range(BLOCKS), BLOCKS)
    tables = [order[0:20], sorted(order[20:30]), order[30:35], order[35:40]]
    known = [random.Random(seed).choices(range(spec.vocab), k=200) for seed in range(4)]
    done = [0] * 4
    for counts in steps:
        batch = []
        for index, count in enumerate(counts):
            if count:
                tokens = known[index][done[index] : done[index] + count]
                batch.append(Slice(tokens, done[index], tables[index], GREEDY if draws else None))
                done[index] += count
        yield decoder.forward(plan_step(batch, BLOCK), kv).cpu().clone()
