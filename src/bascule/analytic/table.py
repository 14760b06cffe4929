"""Rows of measured deployments, as in the calibration table: read, checked, and made deployments with loads."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from msgspec import Struct

from bascule.analytic.catalogue import Catalogue
from bascule.analytic.deployment import NUMBER_BYTES, Deployment, Load, Spread
from bascule.errors import ConfigError

_SIZES = ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
_SIDES = tuple(f"{side}_{name}" for side in ("prefill", "decode") for name in ("num_workers", *_SIZES))
NEEDED = (
    *("id", "backend", "model_path", "system", "mode", "isl", "osl", "gemm_quant_mode", "moe_quant_mode"),
    *("silicon_concurrency", *_SIZES, *_SIDES),
)
_TEXTS = ("backend_version", "precision", "source", "measured", "flags")
MEASURED = ("silicon_ttft_ms", "silicon_tpot_ms")
_BATCHES = ("batch_size", "prefill_batch_size", "decode_batch_size")
KNOWN = frozenset((*NEEDED, *_TEXTS, *MEASURED, *_BATCHES))
_NUMBERS = ("isl", "osl", "silicon_concurrency", *_BATCHES, *_SIZES, *_SIDES, *MEASURED)
_QUANT_WORDS = {"": None, "bfloat16": "bf16", "float16": "bf16", "fp4": "nvfp4", "int4": "int4_wo"}


class Row(Struct, frozen=True, kw_only=True):
    """One line: what it asks, or why it cannot be judged."""

    line: int
    id: str
    values: dict[str, str]
    deployment: Deployment | None
    load: Load | None
    why_not: str = ""
    ttft_ms: float | None = None
    """As measured."""
    tpot_ms: float | None = None


def read_rows(path: Path, catalogue: Catalogue) -> tuple[list[Row], list[str]]:
    """All rows of a CSV file, and the names of columns that are not known and were left aside.

    Raises ConfigError where the file cannot be read, lacks a column or holds something that is not a number where one
    must be; the message names the line. A row with an unknown name or without a number that it needs says so itself.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="")
            unknown = _check_columns(path, reader.fieldnames or [])
            rows = []
            for values in reader:
                if "" in values or None in values.values():
                    raise ConfigError(f"{path}, line {reader.line_num}: not as many fields as the header has")
                rows.append(_row(f"{path}, line {reader.line_num}", reader.line_num, values, catalogue))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file of UTF-8 text: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has a header and no rows")
    _check_ids(path, rows)
    return rows, unknown


def configuration(row: Row) -> tuple[str, ...]:
    """What two measurements of the same thing have in common: all that is asked, without when and by whom."""
    apart = {"id", *_TEXTS, *MEASURED} - {"precision"}
    return tuple(row.values.get(name, "") for name in sorted(KNOWN - apart))


def _check_columns(path: Path, found: Sequence[str]) -> list[str]:
    if not found:
        raise ConfigError(f"{path} is empty; the first line must name the columns: {', '.join(NEEDED)}, ...")
    missing = [name for name in NEEDED if name not in found]
    unknown = [name for name in found if name not in KNOWN]
    if missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1, cutoff=0.7)
        hint = f"; is {near[0]!r} meant to be {missing[0]!r}?" if near else ""
        raise ConfigError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}{hint}")
    if len(set(found)) < len(found):
        raise ConfigError(f"{path} names a column twice: {next(name for name in found if found.count(name) > 1)}")
    return unknown


def _check_ids(path: Path, rows: Sequence[Row]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if not row.id:
            raise ConfigError(f"{path}, line {row.line}: the id is empty")
        if row.id in seen:
            raise ConfigError(f"{path}, line {row.line}: the id {row.id!r} is that of line {seen[row.id]} too")
        seen[row.id] = row.line


def _row(where: str, line: int, values: dict[str, str], catalogue: Catalogue) -> Row:
    numbers = {name: _number(where, name, values.get(name, "")) for name in _NUMBERS}
    deployment, load, why_not = None, None, ""
    try:
        deployment, load = _deployment(values, numbers, catalogue), _load(values, numbers)
    except ConfigError as error:
        why_not = str(error)
    return Row(
        line=line,
        id=values["id"],
        values=values,
        deployment=deployment if load else None,
        load=load,
        why_not=why_not,
        ttft_ms=numbers["silicon_ttft_ms"],
        tpot_ms=numbers["silicon_tpot_ms"],
    )


def _number(where: str, name: str, text: str) -> float | None:
    """A number that is not negative; None for an empty field. Sizes and lengths must be whole."""
    text = text.strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    whole = name in MEASURED or number == math.floor(number) if math.isfinite(number) else False
    if not whole or number < 0:
        kind = "number" if name in MEASURED else "whole number"
        raise ConfigError(f"{where}: {name} is {text!r}; it must be a {kind}, zero or more, or empty")
    return number


def _deployment(values: Mapping[str, str], numbers: Mapping[str, float | None], catalogue: Catalogue) -> Deployment:
    mode = values["mode"].strip()
    if mode not in ("agg", "disagg"):
        raise ConfigError(f"the mode is {mode!r}; known are 'agg' and 'disagg'")
    quantised = values.get("precision", "") in ("fp8", "fp4") or values["gemm_quant_mode"].startswith(("fp8", "nvfp4"))
    split = mode == "disagg"
    model, system = catalogue.resolve(values["model_path"].strip()), values["system"].strip()
    return Deployment(
        model=model,
        shape=catalogue.find_model(model),
        system=system,
        hardware=catalogue.find_hardware(system),
        framework=values["backend"].strip(),
        weights=_number_kind("gemm_quant_mode", values),
        expert_weights=_number_kind("moe_quant_mode", values),
        kv_bytes=1.0 if quantised else 2.0,
        prefill=_spread("prefill_", numbers) if split else None,
        decode=_spread("decode_" if split else "", numbers),
        dated=_years(values.get("measured", "")),
        version=_version(values.get("backend_version", "")),
    )


def _number_kind(name: str, values: Mapping[str, str]) -> str:
    text = values[name].strip()
    kind = _QUANT_WORDS.get(text, text) or "bf16"
    if kind not in NUMBER_BYTES:
        raise ConfigError(f"the {name} {text!r} is not known; known are {', '.join(NUMBER_BYTES)} and none")
    return kind


def _spread(side: str, numbers: Mapping[str, float | None]) -> Spread:
    """The sizes of one side; a size that is empty or zero is one, but for `tp_size`, without which nothing is known."""
    tp = numbers[f"{side}tp_size"]
    if not tp:
        raise ConfigError(f"{side}tp_size is {'empty' if tp is None else 'zero'}; without it the GPUs are not known")
    count = numbers.get(f"{side}num_workers") if side else 1
    sizes = {name: int(numbers[f"{side}{column}"] or 1) for name, column in zip(_SPREAD, _SIZES, strict=True)}
    return Spread(workers=int(count) if count else None, **sizes)


_SPREAD = ("tp", "pp", "dp", "moe_tp", "ep")


def _load(values: Mapping[str, str], numbers: Mapping[str, float | None]) -> Load:
    """The concurrency, or where it is empty the batch of all workers together."""
    prompt, output, concurrency = numbers["isl"], numbers["osl"], numbers["silicon_concurrency"]
    if not concurrency:
        side = "decode_" if values["mode"] == "disagg" else ""
        batch = numbers[f"{side}batch_size"]
        many = numbers["decode_num_workers"] if side else 1
        replicas = numbers[f"{side}attention_dp_size"] or 1
        concurrency = batch * (many or 1) * replicas if batch else None
    if not prompt or not output or not concurrency:
        empty = next(n for n, v in (("isl", prompt), ("osl", output), ("silicon_concurrency", concurrency)) if not v)
        raise ConfigError(f"{empty} is empty or zero")
    return Load(prompt=int(prompt), output=int(output), concurrency=int(concurrency))


def _years(text: str) -> float | None:
    try:
        day = date.fromisoformat(text.strip())
    except ValueError:
        return None
    return day.year + (day.timetuple().tm_yday - 1) / 365


def _version(text: str) -> float | None:
    parts = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
    if not parts:
        return None
    return int(parts[1]) + int(parts[2]) / 100 + int(parts[3] or 0) / 10_000
