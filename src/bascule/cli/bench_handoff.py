"""`bascule bench handoff`: how fast KV moves between two workers, and what a request notices of it."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

from bascule.bench.handoff import HandoffReport, HandoffSettings, measure
from bascule.cli.report import JsonTarget, write_json
from bascule.config import parse_size
from bascule.errors import ConfigError


def handoff(
    model: str = "smollm2",
    /,
    *,
    prompt_tokens: str = "128,512,1500",
    transports: str = "shm,tcp",
    runs: int = 5,
    size: str = "64MiB",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    json: JsonTarget = None,
) -> None:
    """Measure the transports beside a memcpy and plain sockets, and the time to the second token with a handoff.

    All figures are medians over interleaved runs in real processes; a ratio is the median of the runs' own ratios.

    Example: bascule bench handoff smollm2 --prompt-tokens 128,1500 --json handoff.json

    Parameters
    ----------
    model
        `smollm2`, a directory in Hugging Face format, a GGUF file or a hub id.
    prompt_tokens
        Prompt lengths for the time to the second token, separated by commas; empty: transports only.
    transports
        Transports for the time to the second token: shm, tcp, tcp-sealed (tcp with a cluster key).
    runs
        Runs that count, after one to warm up.
    size
        Bytes of one transfer.
    dtype
        Number format of weights and KV.
    json
        File to write the figures to, `-` for standard output.
    """
    report = measure(
        HandoffSettings(
            model=model,
            dtype=dtype,
            size=parse_size(size, "size"),
            lengths=_lengths(prompt_tokens),
            transports=[name.strip() for name in transports.split(",") if name.strip()],
            runs=runs,
        )
    )
    if json != "-":
        _show(report, Console())
    write_json(report, json)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"--prompt-tokens {text!r}: write numbers separated by commas, for example 128,1500"
        ) from None


def _show(report: HandoffReport, console: Console) -> None:
    moved = Table(title=f"{report.bytes_per_transfer / 1e6:.0f} MB from process to process")
    for heading in ("transport", "GB/s", "baseline", "GB/s", "ratio", "CPU s/GB", "baseline's"):
        moved.add_column(heading, justify="left" if heading in ("transport", "baseline") else "right")
    for row in report.transports:
        moved.add_row(
            f"{row.name}, verified" if row.verified else row.name,
            f"{row.bytes_per_s / 1e9:.2f}",
            row.baseline,
            f"{row.baseline_bytes_per_s / 1e9:.2f}",
            f"{row.ratio:.2f}",
            f"{row.cpu_s_per_gb:.3f}",
            f"{row.baseline_cpu_s_per_gb:.3f}",
        )
    moved.caption = f"medians of {report.runs} run(s), each ratio too: of a run's own two rates"
    console.print(moved)
    if not report.second_token:
        return
    seconds = Table(title="time to the second token")
    for heading in ("prompt tokens", "transport", "remote s", "local s", "ratio", "exposed ms"):
        seconds.add_column(heading, justify="left" if heading == "transport" else "right")
    for one in report.second_token:
        seconds.add_row(
            str(one.prompt_tokens),
            one.transport,
            f"{one.remote_s:.3f}",
            f"{one.local_s:.3f}",
            f"{one.ratio:.3f}",
            f"{one.exposed_s * 1e3:.1f}",
        )
    console.print(seconds)
