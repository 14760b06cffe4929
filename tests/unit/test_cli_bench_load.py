"""`bascule bench load`: what it writes and prints, when it is stopped, and what it says to wrong use."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_server import STREAM, Body, FakeServer, Part
from openai_rig import answer, refusal, serving
from rich.console import Console

from bascule.bench.load import Record
from bascule.cli.bench_load_view import Progress
from bascule.cli.main import main

Command = Callable[..., int]
VOCABULARY = ("--vocabulary", "3:250")
COLD = ("--warm-up", "0", *VOCABULARY)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    made.answer = lambda body: answer(body, a_chunk=8)
    with serving(made):
        yield made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command and returns its exit code."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bascule", "bench", "load", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return command


def trace(folder: Path, rows: int = 4) -> Path:
    path = folder / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": 600, "output_length": 16, "hash_ids": [0, %d]}\n'
    path.write_text("".join(row % (100 * number, number + 1) for number in range(rows)))
    return path


def test_a_run_writes_the_figures_that_scripts_rely_on_and_a_page_that_needs_nothing_else(
    server: FakeServer, run: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, page = tmp_path / "load.json", tmp_path / "load.html"
    flags = ("--workload", "chat", "--concurrency", "2", "--requests", "7", "--warm-up", "1", *VOCABULARY)
    assert run(server.url, *flags, "--json", str(figures), "--html", str(page)) == 0
    report = json.loads(figures.read_text())
    assert [report[key] for key in ("requests", "completed", "rejected", "errors")] == [7, 7, 0, 0]
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        assert 0 <= report[key]["p50"] <= report[key]["p90"] <= report[key]["p99"]
        assert report[key]["mean"] >= 0
    assert 0 <= report["itl_s"]["p50"] <= report["itl_s"]["p99"] <= report["itl_s"]["max"]
    assert report["output_tokens_per_s"] > 0
    assert report["requests_per_s"] > 0
    assert report["goodput_per_s"] >= 0
    assert report["slo"] == {"ttft_s": 2.0, "tpot_s": 0.06, "gap_s": 0.2}
    assert report["tokens_counted_by"] == {"token_ids": 7}
    assert report["output_tokens"] == sum(body["max_tokens"] for body in server.bodies[-7:])
    text = page.read_text()
    assert text.count("<svg") == 8
    assert not re.search(r"<script|<link|src=|href=|@import|url\(", text)
    told = capsys.readouterr().out
    assert "7 completed, 0 rejected (429), 0 errors" in told
    assert "TTFT" in told


def test_a_trace_is_replayed_with_its_lengths_and_shared_blocks(
    server: FakeServer, run: Command, tmp_path: Path
) -> None:
    assert run(server.url, "--trace", str(trace(tmp_path)), "--speed", "4", *COLD) == 0
    bodies = server.bodies[-4:]
    assert [(len(body["prompt"]), body["max_tokens"]) for body in bodies] == [(600, 16)] * 4
    assert len({tuple(body["prompt"][:512]) for body in bodies}) == 1
    assert len({tuple(body["prompt"][512:]) for body in bodies}) == 4


def test_figures_on_standard_output_stand_there_alone(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rate", "100", "--burstiness", "2", "--requests", "5", "--slo-ttft", "inf", *COLD)
    assert run(server.url, *flags, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slo"]["ttft_s"] is None
    assert report["rate"] == 100
    assert report["client"]["late_s"]["max"] >= 0


def test_a_run_in_which_nothing_was_completed_ends_with_1_and_says_why(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(body: Body) -> list[Part]:
        return answer(body) if body["max_tokens"] == 4 else refusal("429 Too Many Requests", "the queue is full")

    server.answer = full
    assert run(server.url, "--concurrency", "1", "--requests", "3", *COLD) == 1
    out, err = capsys.readouterr()
    assert "3 rejected (429)" in out
    assert "no request was completed; the first said: status 429: the queue is full" in err


def test_ctrl_c_prints_what_was_measured_so_far(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0

    def two_then_none(body: Body) -> list[Part]:
        nonlocal asked
        asked += body["max_tokens"] != 4
        if asked < 3:
            return answer(body, a_chunk=8)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return [STREAM, None]

    server.answer = two_then_none
    assert run(server.url, "--workload", "chat", "--concurrency", "1", *COLD) == 0
    told = capsys.readouterr().out
    assert "2 requests in" in told
    assert "stopped while 1 requests were under way" in told


def test_ctrl_c_during_the_warm_up_ends_the_run_before_it_begins(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(body: Body) -> list[Part]:
        if body["max_tokens"] == 4:
            return answer(body)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return [STREAM, None]

    server.answer = none
    assert run(server.url, "--concurrency", "1", "--warm-up", "1", *VOCABULARY) == 1
    assert "the run was stopped before" in capsys.readouterr().err


def test_a_terminal_shows_how_the_run_goes() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with Progress(console, 5) as progress:
        for error, rejected in (("", False), ("", False), ("status 429", True), ("cut off", False)):
            progress.sent()
            gaps = (0.05, 0.25)
            progress.ended(Record(start=0.0, ttft=0.4, e2e=0.7, gaps=gaps, tokens=3, error=error, rejected=rejected))
        progress.sent()
    shown = screen.getvalue()
    assert "4 of 5 ended, 1 under way, 1 rejected, 1 errors" in shown
    assert "p50 400.0" in shown
    assert "p99 250.0" in shown


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "say how requests are to come"),
        (("--concurrency", "1", "--rate", "1"), "give one of them"),
        (("--concurrency", "0"), "--concurrency: 0 is too few"),
        (("--rate", "0"), "a rate of 0 is not possible"),
        (("--rate", "-1"), "a rate of -1 is not possible"),
        (("--rate", "1", "--burstiness", "0"), "a burstiness of 0"),
        (("--rate", "1", "--bursts", "10"), "is not ON:OFF"),
        (("--concurrency", "1", "--bursts", "1:2"), "--bursts goes with --rate only"),
        (("--concurrency", "1", "--workload", "chess"), "workload 'chess' is not known; there are chat"),
        (("--concurrency", "1", "--speed", "2"), "--speed goes with --trace only"),
        (("--concurrency", "1", "--duration", "0"), "--duration: 0"),
        (("--concurrency", "1", "--timeout", "0"), "--timeout: 0"),
        (("--concurrency", "1", "--vocabulary", "9"), "LOW:HIGH"),
        (("--concurrency", "1", "--slo-ttft", "-1"), "slo-ttft"),
        (("--trace", "/nowhere.jsonl"), "cannot read the trace /nowhere.jsonl"),
        (("--concurrency", "1", "--model", "ours"), "has no model 'ours'; it serves theirs"),
    ],
)
def test_wrong_use_is_told_in_one_line_and_ends_with_2(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    assert run(server.url, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bascule: ")
    assert told in line


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:9", "cannot reach http://127.0.0.1:9"),
        ("127.0.0.1:8000", "is no address of a server"),
        ("http://127.0.0.1:port", "is no address of a server"),
    ],
)
def test_a_server_that_is_not_there_is_told_in_one_line(
    run: Command, capsys: pytest.CaptureFixture[str], url: str, told: str
) -> None:
    assert run(url, "--concurrency", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_malformed_trace_is_told_with_its_line(
    server: FakeServer, run: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = trace(tmp_path)
    path.write_text(path.read_text() + '{"timestamp": 5}\n')
    assert run(server.url, "--trace", str(path)) == 2
    assert f"the trace {path}, line 5: " in capsys.readouterr().err
