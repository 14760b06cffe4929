"""What `doctor` calls wrong is what `serve` refuses, in the same line, before any worker is started."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cli_rig import Run, runner

from bascule.cli import doctor as examining
from bascule.cli import serve as serving
from bascule.control.devices import Device
from bascule.hardware import ClassFile, Hardware, add_to_file
from bascule.models import load
from bascule.types import CostModel

read_once = cache(load)
COST = CostModel(step_s=0.001, token_s=0.001)
STORE = "--kv-host=64MiB"


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever got so far would have been let pass; and what doctor does to the log is undone."""

    def refuse(*_: object) -> None:
        raise AssertionError("serve would have started")

    monkeypatch.setattr(serving, "Deployment", refuse)
    monkeypatch.setattr(serving, "begin_log", lambda *_: None)
    for command in (serving, examining):
        monkeypatch.setattr(command, "load", read_once)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, "doctor")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys, "serve")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    add_to_file(folder / "cuda.json", Hardware(classes=(ClassFile(name="gpu", cost=COST, device="cuda"),)))
    add_to_file(folder / "llama.json", Hardware(classes=(ClassFile(name="any", cost=COST),), model="llama"))
    (folder / "junk.json").write_text('{"token_s": "long"}')
    return folder


REFUSED = [
    (["--policy=replicated", "--handoff=store", STORE], "--handoff store has no effect under policy replicated"),
    (["--handoff=auto"], "--handoff auto needs a KV store"),
    (["--kv-memory=1KiB"], "--kv-memory 1KiB holds 0 blocks"),
    (["--no-prefix-cache", STORE], "need the prefix cache; leave out --no-prefix-cache"),
    (["--kv-host=64KiB"], "--kv-host: 65536 bytes hold no two blocks"),
    (["--kv-disk={}/kv:64KiB"], "--kv-disk: 65536 bytes hold no two blocks"),
    (["--max-model-len=99999999"], "a context of 99999999 tokens was asked for; the model has"),
    (["--engine=mock", "--kv-codec=int8", STORE], "--kv-codec: codec int8 needs KV of"),
    (["--engine=mock", "--cost-model={}/none.json"], "cannot read the cost model"),
    (["--engine=mock", "--cost-model={}/junk.json"], "junk.json is not a cost model"),
    (["--hardware={}/none.json"], "none.json: No such file"),
    (["--hardware={}/cuda.json", "--devices=cpu,cpu"], "there is no class of workers on cpu with"),
    (["--hardware={}/cuda.json", "--worker-class=gpus"], "there is no class 'gpus'; there are gpu"),
    (["--hardware={}/llama.json"], "llama.json was measured with the model llama, and this is"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_doctor_and_serve_refuse_the_same_in_the_same_line(
    flags: list[str], said: str, doctor: Run, serve: Run, smollm2: Path, files: Path
) -> None:
    given = [smollm2, "--port=0", *(flag.format(files) for flag in flags)]
    code, out, _ = doctor(*given)
    [line] = [line.removeprefix("WRONG  ") for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1 and said in line
    code, _, error = serve(*given)
    assert (code, error.splitlines()[-1]) == (2, f"bascule: {line}")


AT_ONCE = [
    (["--kv-memory", "lots"], "kv-memory"),
    (["--kv-memory", "900TiB"], "--kv-memory 900TiB for each of 2 workers are more than"),
    (["--handoff", "store"], "--handoff store needs a KV store"),
    (["--kv-codec", "int8"], "kv-codec is int8, but must be left out without --kv-host, --kv-disk or --kv-remote"),
    (["--transfer", "shm", "--transfer-codec", "auto"], "transfer-codec is auto, but must be none with"),
    (["--transfer-codec", "int8", "--engine", "mock"], "--transfer-codec: codec int8 needs KV of"),
    (["--policy", "single", "--transfer-codec", "int8"], "--transfer-codec int8 has no effect under policy single"),
    (["--policy", "random", "--handoff", "auto", "--kv-host", "1GiB"], "--handoff auto has no effect under policy"),
    (["--devices", "cpu:0"], "--devices lists 1 devices for 2 workers"),
    (["--devices", "tpu:0,tpu:1"], "'tpu:0' is not a device"),
    (["--policy", "disaggregated", "--prefill", "1"], "at least one --prefill and one --decode"),
    (["--policy", "single", "--mixed", "2"], "policy single runs 1 worker, not 2"),
    (["--dtype", "float8"], "float8"),
]


@pytest.mark.parametrize(("flags", "said"), AT_ONCE, ids=[" ".join(flags) for flags, _ in AT_ONCE])
def test_serve_refuses_what_cannot_work_before_it_looks_at_the_model(
    flags: list[str], said: str, serve: Run, smollm2: Path
) -> None:
    code, out, error = serve(smollm2, "--port=0", *flags)
    assert code == 2 and said in " ".join((out + error).split())


def test_what_serve_would_start_doctor_lets_pass(doctor: Run, smollm2: Path, files: Path) -> None:
    fine = ["--kv-memory=64MiB", f"--kv-disk={files}/kv:64MiB", "--kv-codec=int8", "--handoff=store"]
    code, out, _ = doctor(smollm2, "--port=0", *fine)
    assert code == 0, out


def test_a_worker_for_another_router_is_looked_at_in_the_same_way(doctor: Run, smollm2: Path, files: Path) -> None:
    away = ["--join=tcp://127.0.0.1:9", f"--hardware={files}/cuda.json", "--worker-class=cpu-1", "--kv-memory=1KiB"]
    _, out, _ = doctor(smollm2, *away)
    assert "--kv-memory 1KiB holds 0 blocks" in out and "no class 'cpu-1'" in out


def test_workers_that_are_listed_have_a_device_each(doctor: Run, smollm2: Path) -> None:
    code, out, _ = doctor(smollm2, "--port=0", "--workers=3", f"--devices={Device('cpu')}")
    assert code == 1 and "--devices lists 1 devices for 3 workers" in out


def test_a_name_is_for_a_worker_that_joins(doctor: Run) -> None:
    code, _, error = doctor("--id=decode-0")
    assert code == 2 and "--id decode-0 is for a worker that joins a router; give --join" in error
    code, _, error = doctor("--id=a b", "--join=tcp://127.0.0.1:1")
    assert code == 2 and "--id 'a b': use 1 to 64 letters, digits, dots, dashes or underscores" in error


def test_doctor_looks_for_the_gpus_that_workers_are_to_use(doctor: Run, smollm2: Path) -> None:
    code, out, _ = doctor(smollm2, "--port=0", "--devices=cuda:62,cuda:63")
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1
    assert ["cuda:62" in wrong[0], "cuda:63" in wrong[1]] == [True, True]
    assert all("CUDA devices here; " in line for line in wrong), "and what to do"
    _, out, _ = doctor(smollm2, "--port=0", "--devices=cuda:62,cuda:63", "--engine=mock")
    assert "CUDA" not in out
