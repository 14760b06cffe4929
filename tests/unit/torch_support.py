"""Tiny random models of every supported family, and a small driver that runs a `TorchRunner` step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from bascule.engine.protocol import Sampled, Slice
from bascule.engine.torch.runner import TorchRunner
from bascule.kv.arena import Arena
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve
from bascule.types import SamplingParams

VOCAB = 131
BLOCK_SIZE = 8
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
DISTRIBUTION = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB)
"""Reports the log probability of every token, which is as good as the logits."""

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3-untied": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama-linear-rope-all-biases-tied-no-gqa": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 6,
        },
    ),
    "mistral-wide-heads": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": None}),
    "qwen2-tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3-wide-heads": (transformers.Qwen3Config, {"head_dim": 20}),
}


def make_model(family: str, directory: Path, seed: int = 7) -> Any:
    """Save a random float32 model of `family` to `directory` and return the transformers model itself."""
    config_class, changes = FAMILIES[family]
    return save_random(config_class(**(_SHAPE | changes)), directory, seed=seed, vectors=0.3, matrices=0.15)


def save_random(config: Any, directory: Path, *, seed: int, vectors: float, matrices: float) -> Any:
    """The same for any config, with parameters of these deviations.

    Every parameter is random, norms and biases included, so that one that is mixed up or dropped shows.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=vectors if parameter.dim() == 1 else matrices)
    model.save_pretrained(directory)
    return model


def float_runner(directory: Path) -> TorchRunner:
    """Of a saved model, exact and in one thread."""
    return runner_of(directory, "float32", "cpu")


def runner_of(directory: Path, dtype: Literal["float32", "bfloat16"], device: str) -> TorchRunner:
    """Of a saved model, in one thread."""
    return TorchRunner(
        ModelDirectory(directory).spec(),
        resolve(str(directory)),
        dtype=dtype,
        device=device,
        threads=1,
        name="tiny",
        block_size=BLOCK_SIZE,
    )


@torch.inference_mode()
def reference_log_probabilities(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """What transformers says of the token after `tokens`, [vocab]."""
    return model(torch.tensor([list(tokens)])).logits[0, -1].float().log_softmax(-1)


@torch.inference_mode()
def reference_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens of transformers after `prompt`, end tokens not minded."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_log_probabilities(model, tokens).argmax()))
    return tokens[len(prompt) :]


def poisoned_arena(runner: TorchRunner, num_blocks: int) -> Arena:
    """An arena whose every number is NaN: reading a position that was never written cannot go unnoticed."""
    arena = Arena.create(runner.card.layout, num_blocks)
    arena.bytes[:] = 0xFF
    return arena


@dataclass
class Running:
    """One greedy sequence under way: its tokens so far, its block table, and how many have their KV computed."""

    prompt: list[int]
    blocks: list[int]
    tokens: list[int] = field(default_factory=list)
    computed: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def next_slice(self, chunk: int, sampling: SamplingParams = GREEDY) -> Slice:
        """The next `chunk` tokens at most; a token is drawn where they reach the end of what is known."""
        end = min(self.computed + chunk, len(self.tokens))
        last = end == len(self.tokens)
        return Slice(
            tokens=self.tokens[self.computed : end],
            start=self.computed,
            blocks=self.blocks,
            sampling=sampling if last else None,
            history=self.tokens if last else (),
            prompt_tokens=len(self.prompt),
        )

    def take(self, part: Slice, sampled: Sampled | None) -> None:
        """Record a step's result."""
        self.computed += len(part.tokens)
        assert (sampled is None) == (part.sampling is None)
        if sampled is not None:
            self.tokens.append(sampled.token)


def step(runner: TorchRunner, sequences: Sequence[Running], chunk: int) -> None:
    """One step over all `sequences`."""
    batch = [sequence.next_slice(chunk) for sequence in sequences]
    for sequence, part, sampled in zip(sequences, batch, runner.execute(batch), strict=True):
        sequence.take(part, sampled)


def generate(runner: TorchRunner, sequence: Running, count: int, chunk: int) -> list[int]:
    """Run `sequence` alone until it has `count` output tokens."""
    while len(sequence.output) < count:
        step(runner, [sequence], chunk)
    return sequence.output


def log_probabilities(sampled: Sampled | None) -> torch.Tensor:
    """The distribution that a `DISTRIBUTION` draw reports, [vocab]."""
    assert sampled is not None
    assert sampled.logprobs is not None
    scores = torch.full((VOCAB,), float("nan"))
    for token, score in sampled.logprobs.top:
        scores[token] = score
    return scores
