"""Tables of deployments: what is read, what is refused with its line, and what is left empty with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from analytic_rig import CATALOGUE, ROW, write_table

from bascule.analytic.catalogue import load_catalogue
from bascule.analytic.deployment import Load, Spread
from bascule.analytic.table import KNOWN, NEEDED, configuration, read_rows
from bascule.errors import ConfigError


def test_a_row_becomes_a_deployment_under_load(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.csv", [{"measured": "2026-04-01", "backend_version": "0.19.0"}])
    (row,), unknown = read_rows(path, CATALOGUE)
    assert row.deployment is not None and unknown == []
    assert row.load == Load(prompt=1024, output=1024, concurrency=16)
    assert row.deployment.decode == Spread(tp=4) and row.deployment.prefill is None
    assert row.deployment.weights == "fp8" and row.deployment.kv_bytes == 1.0
    assert row.deployment.version == pytest.approx(0.19)
    assert row.deployment.dated == pytest.approx(2026 + 90 / 365)


def test_a_disaggregated_row_has_two_spreads_and_perhaps_no_number_of_workers(tmp_path: Path) -> None:
    row = {"mode": "disagg", "tp_size": "", "prefill_tp_size": "2", "decode_tp_size": "8", "decode_num_workers": "3"}
    (read,), _ = read_rows(write_table(tmp_path / "rows.csv", [row]), CATALOGUE)
    assert read.deployment is not None
    assert read.deployment.prefill == Spread(tp=2, workers=None)
    assert read.deployment.decode == Spread(tp=8, workers=3)


def test_without_concurrency_the_batches_of_all_workers_count(tmp_path: Path) -> None:
    row = {
        "mode": "disagg",
        "silicon_concurrency": "",
        "prefill_tp_size": "1",
        "decode_tp_size": "1",
        "decode_batch_size": "48",
        "decode_num_workers": "11",
    }
    (read,), _ = read_rows(write_table(tmp_path / "rows.csv", [row]), CATALOGUE)
    assert read.load is not None and read.load.concurrency == 528


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"system": "h200"}, "hardware 'h200' is not in the catalogue; the nearest name is 'h200_sxm'"),
        ({"model_path": "meta-llama/Llama-3.1-71B"}, "nearest name is 'meta-llama/Llama-3.1-70B'"),
        ({"mode": "both"}, "mode is 'both'"),
        ({"tp_size": ""}, "tp_size is empty"),
        ({"gemm_quant_mode": "fp7"}, "gemm_quant_mode 'fp7' is not known"),
        ({"osl": "0"}, "osl is empty or zero"),
        ({"silicon_concurrency": ""}, "silicon_concurrency is empty"),
    ],
)
def test_a_row_that_cannot_be_judged_says_why(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    path = write_table(tmp_path / "rows.csv", [{}, {"id": "two"} | change])
    (good, bad), _ = read_rows(path, CATALOGUE)
    assert good.deployment is not None and good.why_not == ""
    assert bad.load is None or bad.deployment is None
    assert reason in bad.why_not


@pytest.mark.parametrize("text", ["many", "-4", "1.5", "nan", "inf", "1e999"])
def test_what_is_no_whole_number_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = write_table(tmp_path / "rows.csv", [{}, {"id": "two", "isl": text}])
    with pytest.raises(ConfigError, match=rf"rows.csv, line 3: isl is '{text}'"):
        read_rows(path, CATALOGUE)


def test_a_missing_column_is_named_with_what_may_be_meant(tmp_path: Path) -> None:
    path = write_table(tmp_path / "rows.csv", [{}], [*(name for name in NEEDED if name != "system"), "sistem"])
    with pytest.raises(ConfigError, match="lacks the column system; is 'sistem' meant to be 'system'"):
        read_rows(path, CATALOGUE)


def test_columns_that_are_not_known_are_told_and_not_read(tmp_path: Path) -> None:
    rows, unknown = read_rows(write_table(tmp_path / "rows.csv", [{}], [*KNOWN, "colour"]), CATALOGUE)
    assert unknown == ["colour"] and rows[0].deployment is not None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00", "not a CSV file of UTF-8 text"),
        (",".join(NEEDED).encode(), "no rows"),
        (",".join(NEEDED).encode() + b"\na,b\n", "line 2: not as many fields"),
        (",".join(NEEDED).encode() + b"\n" + b"," * len(NEEDED) + b"\n", "line 2: not as many fields"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        read_rows(path, CATALOGUE)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 3: the id 'one' is that of line 2 too"):
        read_rows(write_table(tmp_path / "rows.csv", [{}, {}]), CATALOGUE)


def test_measurements_of_the_same_thing_are_one_configuration(tmp_path: Path) -> None:
    later = {"id": "two", "measured": "2026-04-01", "silicon_ttft_ms": "7", "backend_version": "9"}
    rows, _ = read_rows(write_table(tmp_path / "rows.csv", [{}, later, {"id": "three", "isl": "2048"}]), CATALOGUE)
    assert configuration(rows[0]) == configuration(rows[1]) != configuration(rows[2])


def test_a_catalogue_of_ones_own_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        '{"hardware": {"h900": {"tflops": {"bf16": 5000}, "memory_tb_s": 20, "memory_gb": 500, "link_gb_s": 900,'
        ' "node": 8, "nic_gbit_s": 800, "price_per_h": 9}}, "aliases": {"ours": "Qwen/Qwen3-32B"}}'
    )
    mine = load_catalogue(path)
    assert mine.find_hardware("h900").peak("fp8") == 5e15
    assert mine.find_model("ours") == CATALOGUE.find_model("Qwen/Qwen3-32B")
    assert ROW["system"] in mine.hardware


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("nvidia/DeepSeek-R1-NVFP4", "deepseek-ai/DeepSeek-V3"),
        ("meta-llama/Llama-3.3-70B-Instruct-FP8", "meta-llama/Llama-3.1-70B"),
        ("Qwen/Qwen3-235B-A22B-FP8", "Qwen/Qwen3-235B-A22B"),
        ("qwen3-32b", "Qwen/Qwen3-32B"),
        ("Qwen/Qwen3-33B", "Qwen/Qwen3-33B"),
    ],
)
def test_a_model_has_its_shape_whoever_publishes_it_in_whatever_form(name: str, shape: str) -> None:
    assert CATALOGUE.resolve(name) == shape


@pytest.mark.parametrize("text", ["{", '{"hardware": {"x": {}}}', '{"colour": 1}'])
def test_a_catalogue_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="catalogue"):
        load_catalogue(path)
