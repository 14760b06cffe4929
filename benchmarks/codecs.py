"""What the codecs of KV cost and what they do to a model's output, on real text; prints a Markdown table.

    python benchmarks/codecs.py [MODEL] [--text FILE ...] [--context 992] [--positions 1000] [--dtype bfloat16]

The KV of the first `--context` tokens of each text is computed, passed through the codec and back, and the text's next
`--positions` tokens are computed over it. What is compared are the distributions after each of these, with those over
the KV as it was (`none`): KL of the exact distribution from the other, in nats, mean over positions; "top moved" is the
mean change of the log probability of the exact one's most likely token; "same top" the share of positions whose most
likely token is the same. Ratio and GB/s (10^9 bytes of KV before encoding, one thread, median) are of the texts' KV.

Below are what bounds any codec of floats: the KV rounded to so many bits of fraction, whatever exponent (e4m3 has 3, so
no scales make `fp8` better than that), and KV that is off by up to a step of bfloat16 at random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bascule.engine.protocol import Slice
from bascule.engine.torch.forms import Decoders, load_decoders
from bascule.engine.torch.plan import plan_step
from bascule.kv.codecs import NAMES, codec_named
from bascule.kv.codecs.base import Codec
from bascule.models import load
from bascule.types import KVLayout

BLOCK, CHUNK, ROUNDS = 16, 512, 15
_DOCS = ("architecture", "operations", "api", "simulation", "performance", "planning")
TEXTS = [Path(__file__).parents[1] / name for name in ("LICENSE", *(f"docs/{name}.md" for name in _DOCS))]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """A codec, and how many blocks at either end of the context stay as they are."""

    codec: Codec
    first: int = 0
    last: int = 0

    @property
    def label(self) -> str:
        kept = [f"{name} {count}" for name, count in (("first", self.first), ("last", self.last)) if count]
        return f"{self.codec.name}, {' and '.join(kept)} blocks exact" if kept else self.codec.name


@dataclass(frozen=True)
class Text:
    """A text whose first `context` tokens have their KV in `kv`, [planes, slots, heads, head_dim]."""

    name: str
    tokens: list[int]
    context: int
    kv: Tensor
    exact: Tensor
    """Log probabilities after the other tokens, [positions, vocab]."""


@torch.inference_mode()
def distributions(decoders: Decoders, tokens: list[int], start: int, kv: Tensor) -> Tensor:
    """Log probabilities after each position from `start` on, [positions, vocab]; writes their KV."""
    blocks = range(kv.shape[1] // BLOCK)
    found = []
    for first in range(start, len(tokens), CHUNK):
        part = tokens[first : first + CHUNK]
        plan = replace(plan_step([Slice(part, first, blocks)], BLOCK), drawn=np.arange(len(part), dtype=np.int32))
        found.append(decoders.for_rows(len(part)).forward(plan, kv).log_softmax(-1))
    return torch.cat(found)


def prepared(decoders: Decoders, layout: KVLayout, name: str, tokens: list[int], context: int) -> Text:
    """Compute the context and, over it, what everything is compared with."""
    slots = -(-len(tokens) // BLOCK) * BLOCK
    kv = torch.zeros((layout.planes, slots, layout.kv_heads, layout.head_dim), dtype=DTYPES[layout.dtype])
    distributions(decoders, tokens[:context], 0, kv)
    return Text(name, tokens, context, kv, distributions(decoders, tokens, context, kv.clone()))


def as_blocks(kv: Tensor, layout: KVLayout) -> NDArray[np.uint8]:
    """The bytes of `kv` in place, [planes, blocks, plane_block_bytes]."""
    return kv.view(torch.uint8).numpy().reshape(layout.planes, -1, layout.plane_block_bytes)


def coded(kv: Tensor, variant: Variant) -> None:
    """Pass KV through a codec and back, in place."""
    whole = kv.contiguous()
    blocks = as_blocks(whole, variant.codec.layout)
    blocks = blocks[:, variant.first : blocks.shape[1] - variant.last]
    variant.codec.decode(variant.codec.encode(blocks), blocks)
    kv.copy_(whole)


def rounded(kv: Tensor, bits: int) -> None:
    """Keep so many bits of each number's fraction, and all of its exponent, in place."""
    fraction, exponent = torch.frexp(kv.float())
    steps = 2.0 ** (bits + 1)
    kv.copy_(torch.ldexp((fraction * steps).round() / steps, exponent))


def shaken(kv: Tensor) -> None:
    """Move each number by up to a step of bfloat16, at random, in place."""
    _, exponent = torch.frexp(kv.float())
    kv.add_(torch.ldexp(2 * torch.rand(kv.shape, generator=torch.Generator().manual_seed(0)) - 1, exponent - 8))


def effect(decoders: Decoders, spoil: Callable[[Tensor], None], texts: list[Text]) -> str:
    """The columns on the model's output; `spoil` does to a text's KV what is to be measured."""
    divergence, moved, same = [], [], []
    for text in texts:
        kv = text.kv.clone()
        spoil(kv[:, : text.context])
        got = distributions(decoders, text.tokens, text.context, kv)
        top = text.exact.argmax(-1, keepdim=True)
        divergence.append((text.exact.exp() * (text.exact - got)).sum(-1))
        moved.append((got.gather(-1, top) - text.exact.gather(-1, top)).abs())
        same.append((got.argmax(-1, keepdim=True) == top).float())
    shares = [float(one.mean()) for one in same]
    whole = f"{torch.cat(divergence).mean():.5f} | {torch.cat(moved).mean():.4f} | {torch.cat(same).mean():.4f}"
    return f"{whole} | {min(shares):.3f} to {max(shares):.3f}"


def seconds(work: Callable[[], object]) -> float:
    """Median of a few."""
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def cost(codec: Codec, texts: list[Text]) -> str:
    """The columns on size and speed."""
    blocks = np.concatenate([as_blocks(text.kv, codec.layout)[:, : text.context // BLOCK] for text in texts], axis=1)
    records, out = codec.encode(blocks), np.zeros_like(blocks)
    encode, decode = seconds(lambda: codec.encode(blocks)), seconds(lambda: codec.decode(records, out))
    ratio = blocks.nbytes / records.nbytes
    return f"{ratio:.2f} | {blocks.nbytes / encode / 1e9:.2f} | {blocks.nbytes / decode / 1e9:.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--context", type=int, default=992)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments = parser.parse_args()
    if arguments.context < BLOCK or arguments.context % BLOCK:
        parser.error(f"--context is a multiple of {BLOCK}")
    loaded = load(arguments.model)
    dtype, layout = DTYPES[arguments.dtype], loaded.spec.kv_layout(arguments.dtype, BLOCK)
    threads = torch.get_num_threads()
    device = torch.device("cpu")
    decoders = load_decoders(loaded.spec, loaded.source, dtype, device, threads, quantize="auto", dense_twin=True)
    texts = []
    for path in arguments.text:
        tokens = loaded.tokenizer.encode(path.read_text())[: arguments.context + arguments.positions]
        if len(tokens) < arguments.context + arguments.positions:
            parser.error(f"{path} has only {len(tokens)} tokens")
        texts.append(prepared(decoders, layout, path.name, tokens, arguments.context))
    print(f"{arguments.model}, {arguments.dtype}, {len(texts)} x {arguments.positions} positions\n")
    print("| codec | ratio | encode GB/s | decode GB/s | KL | top moved | same top | by text |")
    print("|" + "---|" * 8)
    for name in NAMES:
        codec = codec_named(name, layout)
        spoil = partial(coded, variant=Variant(codec))
        print(f"| {name} | {cost(codec, texts)} | {effect(decoders, spoil, texts)} |", flush=True)
    codec = codec_named(NAMES[-1], layout)
    for first, last in ((1, 0), (0, 8), (1, 8)):
        variant = Variant(codec, first, last)
        print(f"| {variant.label} | | | | {effect(decoders, partial(coded, variant=variant), texts)} |", flush=True)
    for bits in (3, 4, 5):
        print(f"| {bits} bits of fraction | | | | {effect(decoders, partial(rounded, bits=bits), texts)} |", flush=True)
    print(f"| a step of bfloat16 | | | | {effect(decoders, shaken, texts)} |", flush=True)


if __name__ == "__main__":
    main()
