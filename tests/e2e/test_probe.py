"""`bascule probe` of a running server with a hardware file: streams go on, a worker that hangs is left out, no block is
lost."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bascule.cli.probe import probe
from bascule.errors import ConfigError
from bascule.hardware import ClassFile, Hardware, LinkFile, add_to_file, read_hardware
from bascule.types import CostModel
from support.cluster import Cluster, serve

COST = CostModel(step_s=0.011, token_s=1e-5, stream_s=(0.011, 0.012))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "hw.json"
    link = LinkFile(source="any", target="any", transport="tcp", latency_s=0.5, bytes_per_s=1e6)
    add_to_file(path, Hardware(classes=(ClassFile(name="any", cost=COST),), links=(link,), model="smollm2"))
    return path


@pytest.fixture(scope="module")
def cluster(file: Path) -> Iterator[Cluster]:
    slow = file.parent / "cost.json"
    slow.write_text('{"step_s": 0.01}')
    mock = ["--engine", "mock", "--cost-model", str(slow), "--kv-memory", "1MiB", "--hardware", str(file)]
    patient = ["--suspect-after", "30", "--dead-after", "60"]
    with serve("smollm2", *mock, *patient, "--prefill", "1", "--decode", "2") as running:
        yield running


def probed(cluster: Cluster, report: Path, **flags: Any) -> dict[str, Any]:
    probe(admin=cluster.ready["admin_url"], json=str(report), size="64KiB", **flags)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def test_workers_are_expected_to_cost_what_the_file_says_before_they_have_taken_a_step(cluster: Cluster) -> None:
    state = cluster.wait(
        lambda state: all(worker["cost"] for worker in state["workers"]), "each has told what it costs"
    )
    for worker in state["workers"]:
        assert worker["cost"]["step_s"] == COST.step_s and worker["cost"]["stream_s"] == list(COST.stream_s)


def test_all_pairs_are_measured_beside_streams_which_have_their_tokens(
    cluster: Cluster, file: Path, tmp_path: Path
) -> None:
    body = {"max_tokens": 150, "ignore_eos": True}
    alone = cluster.complete(list(range(100, 140)), **body)["choices"][0]["token_ids"]
    beside: list[list[int]] = []
    stream = threading.Thread(
        target=lambda: beside.append(cluster.complete(list(range(100, 140)), **body)["choices"][0]["token_ids"])
    )
    stream.start()
    found = probed(cluster, tmp_path / "found.json", out=file)
    stream.join()
    assert beside == [alone] and len(alone) == 150
    ends = [(one["from"], one["to"], one["transport"]) for one in found["links"]]
    assert ends == [("prefill-0", f"decode-{n}", way) for n in (0, 1) for way in ("shm", "tcp")]
    assert found["not_measured"] == []
    for one in found["links"]:
        assert one["bytes_per_s"] > 0 and one["latency_s"] > 0 and one["same_machine"] and len(one["push_s"]) == 5
    for one in found["meaning"]:
        assert one["kv_bytes"] == 32 * one["prompt_tokens"] and 0 < one["exposed_s"] <= one["transfer_s"] + 1e-9
    hardware = read_hardware(file)
    assert len(hardware.links) == 5 and hardware.names == ["any"] and len(hardware.measured.links) == 4
    cluster.wait_idle()


@pytest.mark.full
def test_a_worker_that_hangs_is_left_out_and_gives_back_what_it_reserved(cluster: Cluster, tmp_path: Path) -> None:
    pid = cluster.pid("decode-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = probed(cluster, tmp_path / "found.json", transports="tcp", runs=2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert [one["to"] for one in found["links"]] == ["decode-0"]
    [missed] = found["not_measured"]
    assert missed["to"] == "decode-1" and "did not answer" in missed["reason"]
    cluster.wait_idle(60)


def test_a_file_of_another_model_is_refused_and_stays_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    add_to_file(other, Hardware(model="llama", classes=(ClassFile(name="a", cost=COST),)))
    before = other.read_bytes()
    with pytest.raises(ConfigError, match="was measured with the model llama, and this is smollm2"):
        probed(cluster, tmp_path / "found.json", out=other)
    assert other.read_bytes() == before
    with pytest.raises(ConfigError, match="give shm, tcp or both"):
        probed(cluster, tmp_path / "found.json", transports="rdma")
