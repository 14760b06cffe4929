"""`bascule bench handoff` in short: real processes, a tiny random model, few bytes; no figure is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cluster import run_cli, run_clis
from unit.tiny_models import tiny_llama_gguf


def test_both_parts_report_what_scripts_rely_on(tmp_path: Path) -> None:
    model, target = tiny_llama_gguf(tmp_path / "tiny.gguf"), tmp_path / "report.json"
    flags = ("--prompt-tokens", "8,100", "--transports", "shm,tcp-sealed", "--runs", "1", "--size", "1MiB")
    ended = run_cli("bench", "handoff", str(model), *flags, "--json", str(target), timeout=240)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "time to the second token" in ended.stdout
    report = json.loads(target.read_text())
    rows = {(row["name"], row["verified"]): row for row in report["transports"]}
    assert {(name, verified) for name in ("shm", "tcp", "tcp-sealed") for verified in (False, True)} <= set(rows)
    for row in rows.values():
        assert row["bytes_per_s"] > 0 and row["baseline_bytes_per_s"] > 0
        assert 0 < row["ratio"] < 1000 and row["cpu_s_per_gb"] > 0
    seconds = [(row["prompt_tokens"], row["transport"]) for row in report["second_token"]]
    assert seconds == [(8, "shm"), (8, "tcp-sealed"), (100, "shm"), (100, "tcp-sealed")]
    for row in report["second_token"]:
        assert 0 < row["remote_first_s"] <= row["remote_s"] and 0 < row["local_first_s"] <= row["local_s"]
        assert row["ratio"] == pytest.approx(row["remote_s"] / row["local_s"])


WRONG = [
    (("--prompt-tokens", "many"), "numbers separated by commas"),
    (("--prompt-tokens", "0"), "at least 1 token"),
    (("--prompt-tokens", "5000"), "context is 256"),
    (("--transports", "pigeon"), "choose from shm, tcp, tcp-sealed"),
    (("--runs", "0"), "start at 1"),
    (("--size", "lots"), "is not a size"),
]


def test_wrong_use_is_exit_code_2_with_the_reason(tmp_path: Path) -> None:
    model = tiny_llama_gguf(tmp_path / "tiny.gguf")
    runs = run_clis(*(("bench", "handoff", str(model), *flags) for flags, _ in WRONG))
    for (flags, message), ended in zip(WRONG, runs, strict=True):
        assert ended.returncode == 2, (flags, ended.stderr)
        assert message in " ".join(ended.stderr.split()), ended.stderr
