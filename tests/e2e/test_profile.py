"""`bascule profile` in short, with a mock engine in the process that is measured, and what serves with its file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bascule.cli.profile import profile
from bascule.config import EngineConfig
from bascule.errors import ConfigError
from bascule.hardware import read_hardware
from support.cluster import environment, run_cli

COST = {"step_s": 0.001, "token_s": 2e-5, "context_s": 1e-8, "draw_s": 1e-5, "stream_s": [0.001, 0.0012, 0.0015]}


@pytest.fixture
def mock(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(COST))
    return ("--engine", "mock", "--cost-model", str(path), "--kv-memory", "4MiB", "--quick")


def test_a_class_is_measured_into_a_file_which_takes_no_other_model(mock: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "hw.json"
    ended = run_cli("profile", "smollm2", "--cores", "1", *mock, "--out", str(out), "--json", "-", timeout=120)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = read_hardware(out)
    [one] = found.classes
    assert (one.name, one.device, one.cores, one.model, one.chunk_tokens) == ("cpu-1", "cpu", 1, "smollm2", 512)
    assert one.cost.token_s > 0 and any(one.cost.stream_s)
    measured = found.measured.classes["cpu-1"]
    assert measured.memory.at_start > 0 and measured.memory.kv_token == one.kv_token_bytes
    assert {step.kind for step in measured.steps} == {"prefill", "cached prefix", "decode", "mixed"}
    assert json.loads(ended.stdout)["classes"][0]["name"] == "cpu-1"
    before = out.read_bytes()
    other = run_cli(
        "profile", "smollm2", *mock, "--cores", "1", "--max-model-len", "512", "--out", str(out), timeout=120
    )
    assert other.returncode == 2 and "was measured with the model smollm2 in another" in other.stderr
    assert out.read_bytes() == before


def _heed_ctrl_c() -> None:
    """What a shell runs in the background ignores SIGINT, and so does all that is started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_neither_a_file_nor_a_process(mock: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "hw.json"
    (tmp_path / "cost.json").write_text(json.dumps(COST | {"step_s": 1.0}))
    command = [sys.executable, "-m", "bascule", "profile", "smollm2", *mock, "--cores", "1", "--out", str(out)]
    process = subprocess.Popen(
        command,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,
    )
    try:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode not in (0, None)
    assert "Traceback" not in told
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert gone and not alive
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"cores": "0"}, "give numbers of cores from 1"),
        ({"cores": "1,1"}, "each once"),
        ({"device": "cpu:0", "cores": "2"}, "from 1 to 1"),
        ({"device": "tpu"}, "is not a device"),
        ({"out": Path("/nowhere/hw.json")}, "/nowhere/hw.json cannot be written"),
        ({"out": Path(__file__)}, "neither a hardware file"),
        ({"engine_config": EngineConfig(engine="mock", kv_memory="1")}, "kv-memory 1 holds 0 blocks"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        profile("smollm2", **flags)
