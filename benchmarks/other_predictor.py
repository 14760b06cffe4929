"""AIConfigurator beside our held-out predictions, on aggregated rows of the calibration table.

Runs in an environment of AIConfigurator's own (`pip install aiconfigurator`), not ours:

    bascule plan calibrate --rows TABLE --held-out held.csv
    aic/bin/python benchmarks/other_predictor.py --rows TABLE --held-out held.csv \
        --model Qwen/Qwen3-32B --system h100_sxm --backend trtllm
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="what `bascule plan calibrate --held-out` wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="ask no further row after this")
    asked = parser.parse_args()
    ours = {row["id"]: row for row in _read(asked.held_out)}
    wanted = (asked.model, asked.system, asked.backend, "agg")
    rows = [row for row in _read(asked.rows) if _kind(row) == wanted and row["silicon_concurrency"]]
    theirs: dict[str, tuple[float, float]] = {}
    refused: list[str] = []
    end = time.monotonic() + asked.seconds
    for row in rows:
        if time.monotonic() > end:
            break
        try:
            theirs[row["id"]] = _estimate(row)
        except Exception as error:  # many kinds of its own; each means that it has no answer
            refused.append(f"{type(error).__name__}: {str(error)[:80]}")
    judged = [row for row in rows if row["id"] in theirs]
    said = {
        "AIConfigurator": [theirs[row["id"]] for row in judged],
        "ours, held out": [(float(ours[row["id"]]["ttft_ms"]), float(ours[row["id"]]["tpot_ms"])) for row in judged],
    }
    print(f"{len(judged)} rows; {len(refused)} refused by AIConfigurator: {sorted(set(refused))}")
    print("| | TTFT mean (median) error % | TPOT |\n|---|---|---|")
    for name, answers in said.items():
        print(f"| {name} | {_errors(judged, answers, 0)} | {_errors(judged, answers, 1)} |")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _kind(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["model_path"], row["system"], row["backend"], row["mode"]


def _estimate(row: dict[str, str]) -> tuple[float, float]:
    """TTFT and TPOT in milliseconds."""
    from aiconfigurator.cli.api import cli_estimate

    replicas = int(row["attention_dp_size"] or 1) or 1
    given = {"gemm_quant_mode": row["gemm_quant_mode"]} if row["gemm_quant_mode"] else {}
    result = cli_estimate(
        row["model_path"],
        row["system"],
        backend_name=row["backend"],
        isl=int(row["isl"]),
        osl=int(row["osl"]),
        batch_size=max(1, int(row["silicon_concurrency"]) // replicas),
        tp_size=int(row["tp_size"]),
        attention_dp_size=replicas,
        **given,
    )
    return result.ttft, result.tpot


def _errors(rows: list[dict[str, str]], answers: list[tuple[float, float]], which: int) -> str:
    column = ("silicon_ttft_ms", "silicon_tpot_ms")[which]
    off = [100 * abs(said[which] / float(row[column]) - 1) for row, said in zip(rows, answers, strict=True)]
    return f"{statistics.mean(off):.1f} ({statistics.median(off):.1f})" if off else "-"


if __name__ == "__main__":
    main()
