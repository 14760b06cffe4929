"""`bascule bench engine`: decode and prefill steps beside what the machine could do at best."""

from __future__ import annotations

import os
from itertools import product
from math import inf

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bascule.cli.models import pull_with_progress
from bascule.cli.report import JsonTarget, write_json
from bascule.errors import ConfigError
from bascule.models import load
from bascule.models.catalog import CATALOG
from bascule.types import SamplingParams


def engine(
    model: str = "smollm2",
    *,
    batches: str = "1,2,4,8,16,32",
    contexts: str = "128,1000,4000",
    lengths: str = "128,512,1165,4000",
    chunks: str = "512",
    rounds: int = 5,
    threads: int = 1,
    device: str = "cpu",
    temperature: float = 0.0,
    top_p: float = 1.0,
    json: JsonTarget = None,
) -> None:
    """Measure decode and prefill steps, beside the rate of memory and of matrix products in the same run.

    Example: bascule bench engine smollm2 --batches 1,8 --contexts 128,1000 --json engine.json

    Parameters
    ----------
    model
        A catalogue name, a directory or a GGUF file.
    batches
        Sequences of a decode step.
    contexts
        Tokens that each of them sees.
    lengths
        Prompts in tokens.
    chunks
        Most prompt tokens of a step.
    rounds
        Every cell is measured this often, in turns with all others; the median counts.
    threads
        Cores to use; the process is pinned to that many.
    device
        `cpu` or `cuda:N`, whose own memory and matrix products are then the limits.
    temperature
        At which decode steps draw their tokens; 0 takes the most likely ones.
    top_p
        Part of the probability that they are drawn from.
    json
        File for the figures, - for standard output.
    """
    batch_sizes, context_sizes = _numbers(batches, "batches"), _numbers(contexts, "contexts")
    prompt_sizes, chunk_sizes = _numbers(lengths, "lengths"), _numbers(chunks, "chunks")
    if device.partition(":")[0] not in ("cpu", "cuda") or device.startswith("cpu:"):
        raise ConfigError(f"device {device!r}: write cpu (the threads' cores are chosen here) or for example cuda:0")
    if rounds < 1 or threads < 1:
        raise ConfigError("rounds and threads must be at least 1")
    if not 0 <= temperature < inf or not 0 < top_p <= 1:
        raise ConfigError("temperature must be at least 0, and top-p more than 0 and at most 1")
    _pin(threads)
    try:
        from bascule.bench import engine as bench
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs {error.name}; pip install 'bascule[engine]' (in a clone: '.[engine]')"
        ) from error
    if model in CATALOG:
        pull_with_progress(model)
    loaded = load(model)
    for size in (*context_sizes, *prompt_sizes):
        if size > loaded.spec.context:
            raise ConfigError(f"{size} tokens were asked for, but {model} has a context of {loaded.spec.context}")
    cells = [*product(batch_sizes, context_sizes), *((1, length) for length in prompt_sizes)]
    most_tokens = max(bench.in_blocks(*cell) for cell in cells)
    sampling = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p)
    rig = bench.EngineBench(model, loaded.spec, loaded.source, threads, most_tokens, device, sampling)
    report = bench.EngineReport(
        machine=bench.machine(device), model=model, threads=threads, rounds=rounds, limits=bench.LimitRates()
    )
    decode = [
        bench.DecodeCell(weights=form, batch=batch, context=context)
        for form in rig.forms
        for context in context_sizes
        for batch in batch_sizes
    ]
    prefill = [
        bench.PrefillCell(weights="bf16", tokens=tokens, chunk=min(chunk, tokens))
        for tokens in prompt_sizes
        for chunk in chunk_sizes
    ]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=rounds * (len(decode) + len(prefill)))
        rig.run(report, decode, prefill, lambda: bar.advance(task))
    if json != "-":
        _show(report)
    write_json(report, json)


def _show(report: object) -> None:
    from bascule.bench.engine import EngineReport

    assert isinstance(report, EngineReport)
    console = Console()
    console.print(
        f"{report.machine}, {report.threads} core(s): reads {report.limits.read_bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {report.limits.gemm_flops / 1e9:.0f} GFLOP/s; medians of {report.rounds}"
    )
    decode = Table(
        "weights", "batch", "context", "step ms", "memory limit ms", "share", "GEMM limit ms", title="decode"
    )
    for cell in report.decode:
        own = (f"{1e3 * cell.step_s:.1f}", f"{1e3 * cell.limit_s:.1f}", f"{cell.ratio:.2f}")
        decode.add_row(cell.weights, str(cell.batch), str(cell.context), *own, f"{1e3 * cell.compute_limit_s:.1f}")
    prefill = Table("weights", "tokens", "chunk", "tokens/s", "GEMM alone tokens/s", "share", title="prefill")
    for prompt in report.prefill:
        rates = (f"{prompt.tokens_per_s:.0f}", f"{prompt.gemm_tokens_per_s:.0f}")
        prefill.add_row(prompt.weights, str(prompt.tokens), str(prompt.chunk), *rates, f"{prompt.ratio:.2f}")
    console.print(decode, prefill)


def _numbers(text: str, key: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or any(number < 1 for number in found):
        raise ConfigError(f"{key}: {text!r} is not a list of positive whole numbers; write for example 1,8,32")
    return found


def _pin(threads: int) -> None:
    """Stay on the last `threads` cores that this process may use, so that figures do not wander."""
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise ConfigError(f"{threads} threads were asked for, but this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[-threads:])
