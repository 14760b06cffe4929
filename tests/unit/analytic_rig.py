"""Deployments, loads and small tables for the tests of the analytic predictor."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bascule.analytic.catalogue import load_catalogue
from bascule.analytic.deployment import Deployment, Load, Spread
from bascule.analytic.table import KNOWN

CATALOGUE = load_catalogue()
CALIBRATION_TABLE = Path(__file__).parents[3] / "shared" / "data" / "silicon_calibration.csv"

ROW = {
    "id": "one",
    "backend": "vllm",
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h200_sxm",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8",
    "tp_size": "4",
    "silicon_concurrency": "16",
}


def deployment(model: str = "meta-llama/Llama-3.1-70B", system: str = "h200_sxm", **more: Any) -> Deployment:
    """Four GPUs, one worker, 8-bit weights, unless `more` says otherwise."""
    given = {"framework": "vllm", "weights": "fp8", "kv_bytes": 1.0, "decode": Spread(tp=4, moe_tp=4)} | more
    return Deployment(
        model=model,
        shape=CATALOGUE.find_model(model),
        system=system,
        hardware=CATALOGUE.find_hardware(system),
        **given,
    )


def load(prompt: int = 1024, output: int = 1024, concurrency: int = 16) -> Load:
    return Load(prompt=prompt, output=output, concurrency=concurrency)


def write_table(path: Path, rows: Iterable[Mapping[str, str]], columns: Iterable[str] = sorted(KNOWN)) -> Path:
    """A CSV file of the columns; fields that a row does not name are those of `ROW`, or empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(ROW | dict(row) for row in rows)
    return path
