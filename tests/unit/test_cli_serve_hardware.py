"""What `serve` and its workers take from a hardware file, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bascule.cli.serve import known_links
from bascule.config import EngineConfig, HandoffConfig, HardwareConfig, ModelConfig, SloConfig, StoreConfig
from bascule.control.actuators.process import WorkerPlan
from bascule.control.devices import Device
from bascule.errors import ConfigError
from bascule.hardware import ClassFile, Hardware, LinkFile, add_to_file
from bascule.types import CostModel, LinkCost, Role, WorkerId
from bascule.worker import process
from bascule.worker.process import WorkerSettings, build

ONE = CostModel(step_s=0.004, token_s=0.001, stream_s=(0.006, 0.008))
TWO = CostModel(step_s=0.002, token_s=0.0005, stream_s=(0.003, 0.004))
CLASSES = (
    ClassFile(name="cpu-1", cost=ONE, device="cpu", cores=1),
    ClassFile(name="cpu-2", cost=TWO, device="cpu", cores=2),
)


def link(source: str, target: str, transport: str, rate: float) -> LinkFile:
    return LinkFile(source=source, target=target, transport=transport, latency_s=0.001, bytes_per_s=rate)


LINKS = (
    link("prefill-0", "decode-0", "shm", 4e9),
    link("prefill-0", "decode-0", "tcp", 1e9),
    link("cpu-1", "cpu-2", "shm", 2e9),
)


def plan(name: str, role: Role, *cores: int) -> WorkerPlan:
    return WorkerPlan(WorkerId(name), role, Device("cpu", cores), ())


PLANS = [
    plan("prefill-0", Role.PREFILL, 0),
    plan("prefill-1", Role.PREFILL, 1),
    plan("decode-0", Role.DECODE, 2, 3),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hw.json"
    add_to_file(path, Hardware(classes=CLASSES, links=LINKS, model="smollm2"))
    return path


def rates(file: Path, transfer: str, **flags: str) -> dict[tuple[str, str], float]:
    found = known_links(HardwareConfig(hardware=file, **flags), PLANS, transfer)  # type: ignore[arg-type]
    return {(str(source), str(target)): cost.bytes_per_s for (source, target), cost in found.items()}


def test_a_link_is_that_of_the_workers_then_of_their_classes_then_a_typical_one(file: Path) -> None:
    found = rates(file, "auto")
    assert found["prefill-0", "decode-0"] == 4e9
    assert found["prefill-1", "decode-0"] == 2e9
    assert found["decode-0", "prefill-0"] == 3e9
    assert len(found) == 6
    assert rates(file, "tcp")["prefill-0", "decode-0"] == 1e9
    assert rates(file, "auto", worker_class="cpu-1")["prefill-1", "decode-0"] == 3e9


def test_a_link_between_two_machines_says_nothing_of_workers_on_one(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    apart = LinkFile(
        source="prefill-0",
        target="decode-0",
        transport="tcp",
        latency_s=0.1,
        bytes_per_s=1e7,
        same_machine=False,
    )
    add_to_file(path, Hardware(classes=CLASSES, links=(apart, *LINKS[2:])))
    assert rates(path, "auto")["prefill-0", "decode-0"] == 2e9


def test_without_links_in_the_file_or_without_a_file_nothing_is_expected(file: Path, tmp_path: Path) -> None:
    assert known_links(HardwareConfig(), PLANS, "auto") == {}
    path = tmp_path / "classes.json"
    add_to_file(path, Hardware(classes=CLASSES))
    assert rates(path, "auto") == {}
    assert LinkCost(0.001, 4e9) in known_links(HardwareConfig(hardware=file), PLANS, "shm").values()


def test_a_device_without_a_class_is_refused_before_anything_starts(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no class of workers on cpu with 3 cores; there are cpu-1 .*bascule profile"
    ):
        known_links(HardwareConfig(hardware=file), [*PLANS, plan("mixed-0", Role.MIXED, 0, 1, 2)], "auto")
    with pytest.raises(ConfigError, match=r"no class 'cpu1'.*did you mean cpu-1"):
        rates(file, "auto", worker_class="cpu1")
    with pytest.raises(ConfigError, match="worker-class is cpu-1, but must be left out without --hardware"):
        HardwareConfig(worker_class="cpu-1")


def settings(smollm2: Path, hardware: HardwareConfig, cores: tuple[int, ...], name: str = "smollm2") -> WorkerSettings:
    return WorkerSettings(
        model=str(smollm2),
        join="",
        worker=WorkerId("a"),
        role=Role.MIXED,
        device_kind="cpu",
        device_index=0,
        cores=cores,
        device_name="cpu",
        host="127.0.0.1",
        model_config=ModelConfig(model_name=name),
        engine_config=EngineConfig(engine="mock", kv_memory="1MiB"),
        handoff_config=HandoffConfig(),
        slo_config=SloConfig(),
        store_config=StoreConfig(),
        hardware_config=hardware,
    )


def test_a_worker_begins_with_the_costs_of_its_class_and_measures_no_other_model_s(smollm2: Path, file: Path) -> None:
    for hardware, cores, cost in (
        (HardwareConfig(hardware=file), (0,), ONE),
        (HardwareConfig(hardware=file), (0, 1), TWO),
        (HardwareConfig(hardware=file, worker_class="cpu-1"), (0, 1), ONE),
    ):
        parts = build(settings(smollm2, hardware, cores))
        assert parts.cost == parts.engine.cost == cost
        parts.arena.close()
    with pytest.raises(ConfigError, match=r"hw.json was measured with the model smollm2, and this is llama"):
        build(settings(smollm2, HardwareConfig(hardware=file), (0,), "llama"))


def test_a_worker_looks_at_its_settings_before_it_loads_weights(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(*_: object) -> None:
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr(process, "_torch_runner", load_weights)
    fine = settings(smollm2, HardwareConfig(), (0,))
    for engine, store, said in (
        (EngineConfig(kv_memory="1KiB"), StoreConfig(), "--kv-memory 1KiB holds 0 blocks"),
        (EngineConfig(prefix_cache=False), StoreConfig(kv_host="1GiB"), "need the prefix cache"),
        (EngineConfig(), StoreConfig(kv_host="64KiB"), "--kv-host: 65536 bytes hold no two blocks"),
    ):
        with pytest.raises(ConfigError, match=said):
            build(replace(fine, engine_config=engine, store_config=store))
