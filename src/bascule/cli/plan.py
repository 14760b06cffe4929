"""`bascule plan predict` and `calibrate`: what hardware that one does not have would do, and the table behind that.

`bascule plan` itself is in `plan_recommend`.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bascule.analytic.boosting import Growth
from bascule.analytic.calibrate import Errors, Line, calibrate
from bascule.analytic.catalogue import load_catalogue
from bascule.analytic.predictor import Basis, Prediction, Predictor, load_calibration
from bascule.analytic.table import Row, read_rows
from bascule.cli.plan_recommend import recommend
from bascule.cli.report import JsonTarget, write_json
from bascule.errors import BasculeError, ConfigError

app = App(name="plan", help="Say what to build for this traffic, SLO and budget, or predict deployments elsewhere.")
app.default(recommend)
_NAMED = 5
"""Reasons that are told one by one."""


@app.command
def predict(
    *,
    rows: Path,
    out: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    catalogue: Path | None = None,
    calibration: Path | None = None,
) -> None:
    """Predict TTFT and TPOT of the deployments in a table, and write `id,ttft_ms,tpot_ms`.

    Rows that cannot be judged are left empty, and told with their reasons on standard error; exit code 1 if none can.

    Example: bascule plan predict --rows deployments.csv --out predicted.csv

    Parameters
    ----------
    rows
        CSV with the columns of the calibration table (docs/planning.md lists them); measured columns are not read.
    out
        CSV to write, a line for each row; `-` for standard output.
    catalogue
        JSON with hardware and models beside, or instead of, the shipped ones of the same names.
    calibration
        What `bascule plan calibrate` has written; the shipped one if not given.
    """
    found, unknown = read_rows(rows, load_catalogue(catalogue))
    predictor = Predictor(load_calibration(calibration))
    judged = [row for row in found if row.deployment and row.load]
    deployments = [row.deployment for row in judged if row.deployment]
    answers = predictor.predict(deployments, [row.load for row in judged if row.load])
    times = {row.id: (answer.ttft_s, answer.tpot_s) for row, answer in zip(judged, answers, strict=True)}
    _write(out, (row.id for row in found), times)
    _say(rows, found, unknown, answers)
    if not judged:
        raise BasculeError(f"no row of {rows} can be judged")


@app.command(name="calibrate")
def calibrate_command(
    *,
    rows: Path,
    out: Path | None = None,
    held_out: Path | None = None,
    catalogue: Path | None = None,
    json: JsonTarget = None,
    trees: int = Growth().trees,
) -> None:
    """Fit the predictor to measured rows, and print its errors on rows that it was not fitted to.

    Held out are a fifth of the configurations (rows of the same configuration together), five times; and each model,
    GPU and framework once. Takes some minutes.

    Example: bascule plan calibrate --rows silicon_calibration.csv --out calibration.json

    Parameters
    ----------
    rows
        CSV as for `predict`, with `silicon_ttft_ms` and `silicon_tpot_ms`.
    out
        File for the calibration, which `predict --calibration` reads.
    held_out
        CSV, as `predict` writes it, for what was said of each row when its configuration was held out.
    catalogue
        JSON with hardware and models beside the shipped ones.
    json
        File for the errors, - for standard output.
    trees
        Trees of the correction, for TTFT and TPOT each.
    """
    if trees < 1:
        raise ConfigError(f"--trees is {trees}; it must be at least 1")
    found, _ = read_rows(rows, load_catalogue(catalogue))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("fitting", total=None)
        calibration, lines, unseen = calibrate(
            found, Growth(trees=trees), lambda what: bar.update(task, description=what)
        )
    if out is not None:
        try:
            out.write_bytes(msgspec.json.encode(calibration) + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot write the calibration to {out}: {error.strerror}") from error
    if held_out is not None:
        _write(held_out, unseen, unseen)
    if json != "-":
        _show(lines, calibration.rows)
    write_json(lines, json)


def _write(out: Path, ids: Iterable[str], answers: Mapping[str, tuple[float, float]]) -> None:
    """Lines of TTFT and TPOT (given in seconds) in milliseconds, empty for ids without an answer."""
    lines = [("id", "ttft_ms", "tpot_ms")]
    for name in ids:
        ttft, tpot = (f"{1000 * time:.4f}" for time in answers[name]) if name in answers else ("", "")
        lines.append((name, ttft, tpot))
    if str(out) == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        return
    try:
        with out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    except OSError as error:
        raise ConfigError(f"cannot write the predictions to {out}: {error.strerror}") from error


def _say(path: Path, rows: Sequence[Row], unknown: Sequence[str], answers: Sequence[Prediction]) -> None:
    """What was judged and how sure that is, and what was not and why, on standard error."""
    told = [f"{len(answers)} of {len(rows)} rows of {path} predicted"]
    for basis in reversed(Basis):
        some = [answer for answer in answers if answer.basis is basis]
        if some:
            expected = some[0].expected
            told.append(
                f"  {len(some)}: {basis}; such rows, held out, were off by {expected.ttft:.0%} in TTFT and"
                f" {expected.tpot:.0%} in TPOT on average"
            )
    if unknown:
        told.append(f"columns that are not known and were not read: {', '.join(unknown)}")
    reasons: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row.why_not:
            reasons[row.why_not].append(row.line)
    if reasons:
        told.append(f"{sum(map(len, reasons.values()))} rows left empty:")
    for reason, lines in reasons.items():
        named = ", ".join(map(str, lines[:_NAMED])) + (", ..." if len(lines) > _NAMED else "")
        told.append(f"  line{'s' * (len(lines) > 1)} {named}: {reason}")
    print("\n".join(told), file=sys.stderr)


def _show(lines: Sequence[Line], rows: int) -> None:
    table = Table(title=f"{rows} rows; mean (median) relative error on what was held out, %", title_justify="left")
    for name in ("held out", "rows of", "rows"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for name in ("limits alone", "fitted physics", "corrected"):
        table.add_column(f"{name}\nTTFT", justify="right")
        table.add_column("\nTPOT", justify="right")
    for line in lines:
        shown = [cell for errors in (line.limits, line.physics, line.corrected) for cell in _cells(errors)]
        table.add_row(line.split, line.rows_of, f"{line.rows:,}", *shown)
    Console().print(table)


def _cells(errors: Errors) -> tuple[str, str]:
    return (
        f"{100 * errors.ttft_mean:.1f} ({100 * errors.ttft_median:.1f})",
        f"{100 * errors.tpot_mean:.1f} ({100 * errors.tpot_median:.1f})",
    )
