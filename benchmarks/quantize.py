"""What the forms of the weights do to a model's output, on real text; prints a Markdown table.

    python benchmarks/quantize.py [MODEL] [--text FILE] [--tokens 1000]

Every position of the text is computed in float32 by torch and in bfloat16 over each form by the native kernels, in
steps of many tokens and, where the form has codes, in steps of few, which multiply the codes themselves. KL is of the
float32 distribution from the form's, in nats, mean over positions; "top moved" is the mean change of the log
probability of float32's most likely token; "same top" the share of positions whose most likely token is the same.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bascule.engine.protocol import Slice
from bascule.engine.torch.forms import FEW, Forward
from bascule.engine.torch.model import Decoder
from bascule.engine.torch.native import NativeDecoder
from bascule.engine.torch.packed import pack
from bascule.engine.torch.plan import plan_step
from bascule.engine.torch.weights import load_native_weights, load_weights
from bascule.models import load
from bascule.models.spec import ModelSpec

BLOCK = 16
FORMS = ("none", "auto", "int8", "int4")


@torch.inference_mode()
def distributions(decoder: Forward, spec: ModelSpec, dtype: torch.dtype, tokens: list[int], chunk: int) -> torch.Tensor:
    """Log probabilities after every position, [tokens, vocab]."""
    blocks = range(-(-len(tokens) // BLOCK))
    kv = torch.zeros((2 * spec.layers, len(blocks) * BLOCK, spec.kv_heads, spec.head_dim), dtype=dtype)
    found = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        plan = plan_step([Slice(part, start, blocks)], BLOCK)
        found.append(decoder.forward(replace(plan, drawn=np.arange(len(part), dtype=np.int32)), kv).log_softmax(-1))
    return torch.cat(found)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--tokens", type=int, default=1000)
    arguments = parser.parse_args()
    loaded = load(arguments.model)
    spec, source = loaded.spec, loaded.source
    tokens = loaded.tokenizer.encode(arguments.text.read_text())[: arguments.tokens]
    exact = distributions(Decoder(spec, load_weights(spec, source, torch.float32)), spec, torch.float32, tokens, 512)
    top = exact.argmax(-1, keepdim=True)
    print(f"{arguments.model}, {len(tokens)} tokens of {arguments.text.name}, against float32\n")
    print("| --quantize | tokens a step | weights MB | KL | top moved | same top |\n|---|---|---|---|---|---|")
    for form in FORMS:
        packed = pack(spec, load_native_weights(spec, source, form))
        decoder = NativeDecoder(spec, packed, torch.get_num_threads())
        for chunk in (512, FEW) if packed.has_codes else (512,):
            got = distributions(decoder, spec, torch.bfloat16, tokens, chunk)
            divergence = (exact.exp() * (exact - got)).sum(-1).mean()
            moved = (got.gather(-1, top) - exact.gather(-1, top)).abs().mean()
            same = (got.argmax(-1, keepdim=True) == top).float().mean()
            size = f"{decoder.weight_bytes / 1e6:.0f}"
            print(f"| {form} | {chunk} | {size} | {divergence:.5f} | {moved:.4f} | {same:.3f} |", flush=True)


if __name__ == "__main__":
    main()
