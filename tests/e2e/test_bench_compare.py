"""`bascule bench compare` with real servers whose workers compute nothing: its report, and that it leaves nothing."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.cluster import environment, run_cli

COST = {"step_s": 0.0005, "token_s": 0.00001, "context_s": 1e-8, "stream_s": [0.0006, 0.0007, 0.0008]}
QUICK = ("--workload", "chat", "--kv-memory", "4MiB", "--requests", "2")


@pytest.fixture
def mocks(tmp_path: Path) -> tuple[str, ...]:
    cost = tmp_path / "cost.json"
    cost.write_text(json.dumps(COST))
    return ("--engine", "mock", "--cost-model", str(cost), *QUICK)


def left_of(folder: str) -> list[psutil.Process]:
    """Processes that were started with files of this folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def comparing(*flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bascule", "bench", "compare", "smollm2", *flags]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment() | {"COLUMNS": "80"})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_real_servers_are_compared_and_sigterm_ends_it_with_a_report_and_no_process_left(
    mocks: tuple[str, ...], tmp_path: Path
) -> None:
    figures, page, text = (tmp_path / f"report.{kind}" for kind in ("json", "html", "md"))
    flags = (*mocks, "--architectures", "replicated,disaggregated", "--levels", "1", "--minutes", "10")
    files = ("--json", str(figures), "--html", str(page), "--markdown", str(text))
    with comparing(*flags, *files) as process:
        assert process.stderr is not None
        said, begun = "", 0
        for line in process.stderr:  # to its end: more turns may begin before the signal is heard
            said += line
            if (seed := re.search(r"seed (\d+), ", line)) is not None:
                if begun < 3 <= int(seed[1]):
                    process.send_signal(signal.SIGTERM)
                begun = int(seed[1])
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert begun >= 3
    assert not left_of(str(tmp_path))
    assert "ended early: it was stopped" in out
    report = json.loads(figures.read_text())
    assert [cell["architecture"] for cell in report["cells"]] == ["replicated", "disaggregated"]
    [seeds] = {cell["seeds"] for cell in report["cells"]}
    assert seeds in (begun - 1, begun), "all that ended, and at most the one under way left out"
    for cell in report["cells"]:
        assert (cell["completed"]["median"], cell["errors"]["median"]) == (2, 0), cell["messages"]
        assert cell["cached_tokens"]["median"] == 0, "no prompt was sent twice"
        assert set(cell["ttft_s"]["p50"]) == {"median", "lo", "hi"}
    assert report["verdict"] in out
    assert "gap p99 ms" in out and "…" not in out, "no table is cut, however narrow the screen"
    assert [(one["architecture"], one["over"]) for one in report["crossovers"]] == [("disaggregated", "replicated")]
    assert page.read_text().count("<svg") == 7
    for told in (report["verdict"], "Who is ahead", "bascule serve smollm2 --policy disaggregated"):
        assert told in text.read_text()


@pytest.mark.full
def test_systems_that_do_not_fit_side_by_side_start_in_turns_and_a_kill_leaves_none(
    mocks: tuple[str, ...], tmp_path: Path
) -> None:
    flags = (*mocks, "--architectures", "replicated,disaggregated", "--levels", "1", "--no-side-by-side")
    figures = tmp_path / "figures.json"
    run = run_cli(
        *("bench", "compare", "smollm2", *flags, "--seeds", "2", "--minutes", "3", "--json", str(figures)), timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert [cell["seeds"] for cell in json.loads(figures.read_text())["cells"]] == [2, 2]
    assert not left_of(str(tmp_path))
    with comparing(*flags, "--minutes", "3") as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "warming" in line)
        process.kill()
        process.wait(10)
    psutil.wait_procs(left_of(str(tmp_path)), timeout=10)
    assert not left_of(str(tmp_path))
