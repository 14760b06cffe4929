"""`bascule plan predict` and `calibrate`: what they write, what they say, and how they end."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest
from analytic_rig import CATALOGUE, write_table
from cli_rig import Run, runner

from bascule.analytic.correction import physical
from bascule.analytic.efficiencies import efficiency_columns
from bascule.analytic.questions import Questions
from bascule.analytic.table import read_rows


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, "plan")


def test_every_row_gets_a_line_and_what_is_left_empty_is_told(run: Run, tmp_path: Path) -> None:
    bad = [{"id": f"bad{number}", "system": "h300"} for number in range(7)]
    rows = write_table(tmp_path / "rows.csv", [{}, *bad, {"id": "last", "silicon_concurrency": "64"}])
    code, _, said = run("predict", "--rows", rows, "--out", tmp_path / "out.csv")
    assert code == 0
    lines = list(csv.reader((tmp_path / "out.csv").open()))
    assert lines[0] == ["id", "ttft_ms", "tpot_ms"]
    assert [line[0] for line in lines[1:]] == ["one", *(row["id"] for row in bad), "last"]
    assert all(line[1:] == ["", ""] for line in lines[2:9])
    assert all(float(cell) > 0 for line in (lines[1], lines[9]) for cell in line[1:])
    assert "2 of 9 rows" in said and "7 rows left empty" in said
    assert "lines 3, 4, 5, 6, 7, ...: the hardware 'h300' is not in the catalogue" in said


def test_predictions_go_to_standard_output_for_a_hyphen(run: Run, tmp_path: Path) -> None:
    code, output, said = run("predict", "--rows", write_table(tmp_path / "rows.csv", [{}]), "--out", "-")
    assert code == 0
    assert output.splitlines()[0] == "id,ttft_ms,tpot_ms" and output.splitlines()[1].startswith("one,")
    assert "model, GPU and framework measured" in said


def test_hardware_of_ones_own_is_predicted_and_called_unmeasured(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    h200 = msgspec.to_builtins(CATALOGUE.find_hardware("h200_sxm"))
    mine.write_bytes(msgspec.json.encode({"hardware": {"h300": h200 | {"memory_tb_s": 9.6}}}))
    rows = write_table(tmp_path / "rows.csv", [{}, {"id": "two", "system": "h300"}])
    code, output, said = run("predict", "--rows", rows, "--out", "-", "--catalogue", mine)
    assert code == 0 and "1: GPU not measured" in said
    slow, fast = (float(line.split(",")[2]) for line in output.splitlines()[1:])
    assert fast < slow


@pytest.mark.parametrize(
    ("change", "code", "complaint"),
    [
        ({"system": "abacus"}, 1, "no row of"),
        ({"isl": "x"}, 2, "line 2: isl is 'x'"),
    ],
)
def test_a_table_that_says_nothing_is_an_error(
    run: Run, tmp_path: Path, change: dict[str, str], code: int, complaint: str
) -> None:
    rows = write_table(tmp_path / "rows.csv", [change])
    ended, _, said = run("predict", "--rows", rows, "--out", tmp_path / "out.csv")
    assert ended == code and complaint in said and "Traceback" not in said


@pytest.mark.parametrize("wrong", ["--rows", "--out", "--catalogue", "--calibration"])
def test_a_file_that_is_not_there_is_named(run: Run, tmp_path: Path, wrong: str) -> None:
    given: dict[str, object] = {"--rows": write_table(tmp_path / "rows.csv", [{}]), "--out": tmp_path / "out.csv"}
    given[wrong] = tmp_path / "nowhere" / "file"
    code, _, said = run("predict", *(word for pair in given.items() for word in pair))
    assert code == 2 and "nowhere/file" in said and "Traceback" not in said


def test_calibrating_on_made_rows_reports_errors_and_makes_what_predict_reads(run: Run, tmp_path: Path) -> None:
    rows = write_table(tmp_path / "rows.csv", made_rows(tmp_path))
    code, output, said = run(
        "calibrate",
        "--rows",
        rows,
        "--out",
        tmp_path / "mine.json",
        "--json",
        "-",
        "--trees",
        "3",
        "--held-out",
        tmp_path / "held.csv",
    )
    assert code == 0, said
    lines = msgspec.json.decode(output)
    assert {line["split"] for line in lines} == {"configurations", "model", "GPU", "framework"}
    held_out = lines[0]
    assert len((tmp_path / "held.csv").read_text().splitlines()) == 97
    assert held_out["rows"] == 96 and held_out["physics"]["tpot_mean"] < held_out["limits"]["tpot_mean"]
    code, _, said = run(
        "predict", "--rows", rows, "--out", tmp_path / "out.csv", "--calibration", tmp_path / "mine.json"
    )
    assert code == 0 and "96 of 96 rows" in said


def test_too_few_measurements_are_refused(run: Run, tmp_path: Path) -> None:
    code, _, said = run("calibrate", "--rows", write_table(tmp_path / "rows.csv", [{}]))
    assert code == 2 and "at least 50 different configurations" in said


def made_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of two models, GPUs and frameworks, "measured" by physics before any fit, a third slower."""
    asked = [
        {
            "id": f"{model}{system}{backend}{tp}{clients}{prompt}",
            "model_path": model,
            "system": system,
            "backend": backend,
            "tp_size": str(tp),
            "silicon_concurrency": str(clients),
            "isl": prompt,
        }
        for model in ("meta-llama/Llama-3.1-70B", "Qwen/Qwen3-32B")
        for system, backend in (("h100_sxm", "vllm"), ("h200_sxm", "trtllm"), ("h200_sxm", "vllm"))
        for tp in (2, 8)
        for clients in (1, 8, 16, 64)
        for prompt in ("512", "4096")
    ]
    rows, _ = read_rows(write_table(folder / "asked.csv", asked), CATALOGUE)
    deployments = [row.deployment for row in rows if row.deployment]
    questions = Questions.of(deployments, [row.load for row in rows if row.load])
    times = 1333 * pow(2.718281828, physical(questions, efficiency_columns(deployments, {})))
    return [
        row | {"silicon_ttft_ms": f"{ttft:.4f}", "silicon_tpot_ms": f"{tpot:.4f}"}
        for row, (ttft, tpot) in zip(asked, times, strict=True)
    ]
