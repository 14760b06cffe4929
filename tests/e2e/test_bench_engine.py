"""`bascule bench engine` in short, on the real model; no figure is judged."""

from __future__ import annotations

import json

import pytest

from bascule.engine.native import build
from bascule.native import cpu_flags
from support.cluster import run_cli, run_clis


def test_both_parts_report_what_scripts_rely_on() -> None:
    flags = ("--batches", "1,2", "--contexts", "40", "--lengths", "64", "--chunks", "32,512", "--rounds", "2")
    flags += ("--temperature", "0.8", "--top-p", "0.9")
    ended = run_cli("bench", "engine", "smollm2", *flags, "--json", "-", timeout=240)
    assert ended.returncode == 0, ended.stderr[-4000:]
    report = json.loads(ended.stdout)
    assert report["machine"]
    assert report["limits"]["read_bytes_per_s"] > 1e8
    assert report["limits"]["gemm_flops"] > 1e8
    forms = ["bf16"] if build.NEEDED - cpu_flags() else ["bf16", "int4"]
    cells = [(row["weights"], row["batch"], row["context"]) for row in report["decode"]]
    assert cells == [(form, batch, 40) for form in forms for batch in (1, 2)]
    for row in report["decode"]:
        assert row["step_s"] > 0
        assert row["ratio"] == pytest.approx(row["limit_s"] / row["step_s"])
    # The limit is that of the bytes in the form used: the file's codes take five bits or nine, bfloat16 sixteen.
    limits = {row["weights"]: row["limit_s"] for row in report["decode"] if row["batch"] == 1}
    assert limits["bf16"] * report["limits"]["read_bytes_per_s"] > 269e6
    assert forms == ["bf16"] or 0.3 < limits["int4"] / limits["bf16"] < 0.45
    assert [(row["tokens"], row["chunk"]) for row in report["prefill"]] == [(64, 32), (64, 64)]
    for row in report["prefill"]:
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["gemm_tokens_per_s"])


WRONG = [
    (("--batches", "two"), "batches: 'two' is not a list of positive whole numbers"),
    (("--contexts", "100000"), "100000 tokens were asked for, but smollm2 has a context of"),
    (("--batches", "100000", "--contexts", "2000"), "GiB of KV memory"),
    (("--rounds", "0"), "must be at least 1"),
    (("--temperature", "-1"), "temperature must be at least 0"),
    (("--threads", "4000"), "4000 threads were asked for"),
    (("--device", "cuda:63"), "CUDA devices here"),
]


def test_wrong_use_is_exit_code_2_with_the_reason() -> None:
    runs = run_clis(*(("bench", "engine", "smollm2", *flags) for flags, _ in WRONG))
    for (flags, message), ended in zip(WRONG, runs, strict=True):
        assert ended.returncode == 2, (flags, ended.stderr)
        assert message in " ".join(ended.stderr.split()), ended.stderr
