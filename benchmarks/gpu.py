"""Our engine beside transformers' continuous batching on one GPU, in turns in one run; prints Markdown tables.

    python benchmarks/gpu.py [--device cuda:0] [--rounds 5] [--folder DIR]

The model has the shape of Llama-3.1-8B and random weights, which are drawn here (16 GB in DIR, kept for the next run).
Decoding: what a step of B sequences takes, and which share of it the device would need to read the weights and the KV
at the rate at which it reads memory. Prefill: one prompt in one step, and which share the products of its layers and
its attention are of what the device multiplies in that time, by the model's own matrices of as many rows. Both rates
are measured in the same run. transformers' times are between the tokens of a stream, and from a prompt to its token.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bascule.bench.engine import DecodeCell, EngineBench, EngineReport, LimitRates, PrefillCell, in_blocks, machine
from bascule.engine.torch.weights import expected_shapes
from bascule.models.hf_directory import ModelDirectory
from bascule.models.source import resolve
from bascule.models.spec import ModelSpec

LLAMA_3_1_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "intermediate": 14336, "vocab": 128_256}
OUTPUT = 32
"""Tokens of a stream of transformers, of which the latter half is timed."""


@dataclass
class Times:
    """Seconds of every round, by batch, and of the prompt."""

    decode: dict[int, list[float]] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=list)


def write_model(folder: Path, shape: dict[str, int], seed: int = 0) -> None:
    """A Llama of `shape` with random bfloat16 weights in `folder`, one file a layer; does nothing if it is there."""
    index = folder / "model.safetensors.index.json"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "intermediate_size": shape["intermediate"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1)
    if index.exists() and (folder / "config.json").read_text() == text:
        return
    (folder / "config.json").write_text(text)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for part, named in groupby(expected_shapes(ModelDirectory(folder).spec()).items(), key=lambda item: _part(item[0])):
        tensors = {}
        for name, size in named:
            drawn = torch.empty(size, dtype=torch.bfloat16)
            tensors[name] = drawn.fill_(1) if len(size) == 1 else drawn.normal_(0, 0.02, generator=generator)
        save_file(tensors, folder / f"{part}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, f"{part}.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _part(name: str) -> str:
    return f"layer-{name.split('.')[2]}" if name.startswith("model.layers.") else "outer"


class Ours:
    """Our engine, and what the device could do at best."""

    def __init__(self, folder: Path, device: str, batches: Sequence[int], context: int, tokens: int) -> None:
        cells = [*((batch, context) for batch in batches), (1, tokens)]
        spec, source = ModelDirectory(folder).spec(), resolve(str(folder))
        self._bench = EngineBench("gpu", spec, source, 1, max(in_blocks(*cell) for cell in cells), device)
        self._batches, self._context, self._tokens = batches, context, tokens
        self.reports: list[EngineReport] = []

    def turn(self, times: Times) -> None:
        """Measure everything once, the limits included."""
        report = EngineReport(machine="", model="", threads=1, rounds=1, limits=LimitRates())
        decode = [DecodeCell(weights="bf16", batch=batch, context=self._context) for batch in self._batches]
        prefill = [PrefillCell(weights="bf16", tokens=self._tokens, chunk=self._tokens)]
        self._bench.run(report, decode, prefill, lambda: None)
        for cell in report.decode:
            times.decode.setdefault(cell.batch, []).append(cell.step_s)
        times.prefill.append(self._tokens / report.prefill[0].tokens_per_s)
        self.reports.append(report)


class Theirs:
    """transformers' continuous batching, as it is configured by itself, but for the room of a prompt in one step."""

    def __init__(self, folder: Path, device: str, batches: Sequence[int], context: int, tokens: int) -> None:
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self._entered = model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=OUTPUT),
            continuous_batching_config=ContinuousBatchingConfig(
                max_batch_tokens=max(tokens, 512), max_memory_percent=0.5, allow_block_sharing=False
            ),
        )
        self._manager = self._entered.__enter__()
        self._vocab = model.config.vocab_size
        self._batches, self._context, self._tokens = batches, context, tokens
        self._random = random.Random(0)

    def close(self) -> None:
        self._entered.__exit__(None, None, None)

    @torch.inference_mode()
    def turn(self, times: Times) -> None:
        """Measure everything once."""
        for batch in self._batches:
            half = OUTPUT // 2
            done = self._generated(batch, max(1, self._context - OUTPUT), OUTPUT)
            steps = [(one.timestamps[-1] - one.timestamps[-1 - half]) / half for one in done]
            times.decode.setdefault(batch, []).append(statistics.median(steps))
        [prompt] = self._generated(1, self._tokens, 1)
        times.prefill.append(prompt.timestamps[0] - prompt.lifespan[0])

    def _generated(self, count: int, length: int, output: int) -> list[Any]:
        prompts = [self._random.choices(range(self._vocab), k=length) for _ in range(count)]
        self._manager.add_requests(prompts, max_new_tokens=output, record_timestamps=True)
        done = []
        while len(done) < count:
            result = self._manager.get_result(timeout=1)
            if result is None and not self._manager.is_running():
                sys.exit("transformers' generation has ended; see its messages above")
            if result is not None and result.is_finished():
                if result.error:
                    sys.exit(f"transformers: {result.error}")
                done.append(result)
        return done


def tables(spec: ModelSpec, reports: Sequence[EngineReport], sides: dict[str, Times], context: int, tokens: int) -> str:
    """Markdown of medians; a side is a name and its times."""
    reads = statistics.median(report.limits.read_bytes_per_s for report in reports)
    flops = statistics.median(report.limits.gemm_flops for report in reports)
    lines = [
        f"Reads {reads / 1e9:,.0f} GB/s, multiplies {flops / 1e12:,.1f} TFLOP/s; medians of {len(reports)} rounds.",
        "",
    ]
    heads = " | ".join(f"{name}, ms | share of the limit" for name in sides)
    lines += [f"| decode, context {context:,} | limit, ms | {heads} |", "|---" * (2 + 2 * len(sides)) + "|"]
    for index, cell in enumerate(reports[0].decode):
        limit = statistics.median(report.decode[index].limit_s for report in reports)
        cells = []
        for times in sides.values():
            step = statistics.median(times.decode[cell.batch])
            cells.append(f"{1e3 * step:.2f} | {limit / step:.0%}")
        lines.append(f"| {cell.batch} | {1e3 * limit:.2f} | {' | '.join(cells)} |")
    heads = " | ".join(f"{name}, tokens/s | share of the peak" for name in sides)
    lines += ["", f"| prefill | {heads} |", "|---" * (1 + 2 * len(sides)) + "|"]
    cells = []
    for times in sides.values():
        seconds = statistics.median(times.prefill)
        cells.append(f"{tokens / seconds:,.0f} | {prefill_flops(spec, tokens) / seconds / flops:.0%}")
    return "\n".join([*lines, f"| {tokens:,} tokens | {' | '.join(cells)} |"])


def prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """Of the layers' matrix products and of causal attention, which is half a square."""
    heads = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    weights = spec.hidden * (heads + spec.heads * spec.head_dim + 3 * spec.intermediate)
    attention = 2 * tokens * spec.heads * spec.head_dim
    return 2.0 * spec.layers * tokens * (weights + attention / 2)


def main() -> None:
    """Measure in turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the model is or will be; default: a folder that goes again")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    for name, size in LLAMA_3_1_8B.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device and torch's build for CUDA, and torch finds none here")
    batches = [int(batch) for batch in arguments.batches.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_model(folder, {name: getattr(arguments, name) for name in LLAMA_3_1_8B})
        measured = (folder, arguments.device, batches, arguments.context, arguments.tokens)
        ours = Ours(*measured)
        theirs = None if arguments.alone else Theirs(*measured)
        sides = {"Bascule": Times()} if theirs is None else {"Bascule": Times(), "transformers": Times()}
        for turn in range(arguments.rounds + 1):
            if turn == 1:  # the one before was for what only a first call pays
                sides = {name: Times() for name in sides}
                ours.reports.clear()
            ours.turn(sides["Bascule"])
            if theirs is not None:
                theirs.turn(sides["transformers"])
        if theirs is not None:
            theirs.close()
        print(f"{machine(arguments.device)}, torch {torch.__version__}", end=". ")
        print(tables(ModelDirectory(folder).spec(), ours.reports, sides, arguments.context, arguments.tokens))


if __name__ == "__main__":
    main()
