"""The hardware file: what is read, what is refused, and how what is measured anew comes into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bascule.cli.simulate import simulate
from bascule.errors import ConfigError
from bascule.hardware import ClassFile, Hardware, LinkFile, add_to_file, read_class, read_hardware
from bascule.types import CostModel, LinkCost

COST = CostModel(step_s=0.002, token_s=0.0002, context_s=1e-6, stream_s=(0.006, 0.007, 0.009))
SLOWER = CostModel(step_s=0.004, token_s=0.0004, context_s=2e-6, stream_s=(0.012, 0.014, 0.018))


def link(source: str, target: str, transport: str = "shm", rate: float = 2e9, *, same: bool = True) -> LinkFile:
    return LinkFile(
        source=source, target=target, transport=transport, latency_s=0.002, bytes_per_s=rate, same_machine=same
    )


def written(path: Path, content: object) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else msgspec.json.encode(content))
    return path


HARDWARE = Hardware(
    classes=(
        ClassFile(name="cpu-1", cost=SLOWER, device="cpu", cores=1, kv_tokens=50_000),
        ClassFile(name="cpu-2", cost=COST, device="cpu", cores=2, kv_tokens=50_000),
    ),
    links=(
        link("prefill-0", "decode-0"),
        link("prefill-0", "decode-0", "tcp", 1e9),
        link("cpu-1", "cpu-2", "tcp", 9e8),
    ),
    model="smollm2",
    fingerprint="aa",
)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    assert add_to_file(path, HARDWARE) == HARDWARE == read_hardware(path)
    assert json.loads(path.read_text())["links"][0]["from"] == "prefill-0"
    assert list(tmp_path.iterdir()) == [path]


def test_a_class_and_a_bare_cost_model_are_hardware_too(tmp_path: Path) -> None:
    bare = read_hardware(written(tmp_path / "core.json", COST))
    assert bare.names == ["core"] and bare.classes[0].cost == COST and bare.links == ()
    [one] = read_hardware(written(tmp_path / "h100.json", ClassFile(cost=COST, model="8B", price_per_hour=3.0))).classes
    assert (one.name, one.model, one.price_per_hour) == ("h100", "8B", 3.0)
    assert read_class(written(tmp_path / "one.json", Hardware(classes=HARDWARE.classes[:1]))).name == "cpu-1"


def test_what_is_measured_anew_replaces_what_was_there_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    add_to_file(path, HARDWARE)
    new = Hardware(
        classes=(ClassFile(name="cpu-1", cost=COST, device="cpu", cores=1), ClassFile(name="gpu", cost=COST)),
        links=(link("prefill-0", "decode-0", "tcp", 5e8), link("decode-0", "prefill-0")),
        model="a path to smollm2",
        fingerprint="aa",
    )
    found = add_to_file(path, new)
    assert found == read_hardware(path)
    assert found.names == ["cpu-1", "cpu-2", "gpu"] and found.named("cpu-1").cost == COST
    assert [(one.transport, one.bytes_per_s) for one in found.links] == [
        ("shm", 2e9),
        ("tcp", 5e8),
        ("tcp", 9e8),
        ("shm", 2e9),
    ]
    assert found.model == "smollm2"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Hardware(model="llama", fingerprint="bb"), "hw.json was measured with the model smollm2, and this is llama"),
        (Hardware(model="smollm2", fingerprint="bb"), "smollm2 in another number format"),
        (Hardware(model="llama"), "hw.json was measured with the model smollm2, and this is llama"),
    ],
)
def test_another_model_does_not_come_into_a_file(tmp_path: Path, other: Hardware, told: str) -> None:
    path = tmp_path / "hw.json"
    add_to_file(path, HARDWARE)
    with pytest.raises(ConfigError, match=told):
        add_to_file(path, other)
    assert read_hardware(path) == HARDWARE


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "neither a hardware file nor a class of workers nor a cost model"),
        (b"\xff\xfe", "neither"),
        (b"[" * 100_000, "neither"),
        (b"[]", "neither"),
        ({"classes": [], "linx": []}, "unknown field `linx`"),
        ({"classes": [{"name": "a", "cost": {}, "speed": 1}]}, "unknown field `speed`"),
        ({"classes": [{"cost": COST}]}, "class 1 has no name"),
        ({"classes": [{"name": "a", "cost": COST}] * 2}, "two classes are called 'a'"),
        ({"classes": [{"name": "a", "cost": COST, "model": "x"}], "model": "y"}, "of several models: y, x"),
        ({"classes": [{"name": "a", "cost": {}}]}, "a says that steps take no time"),
        ({"classes": [{"name": "a", "cost": {"step_s": -1}}]}, "not negative"),
        ({"links": [{"from": "a", "to": "b", "transport": "shm", "latency_s": 0, "bytes_per_s": 0}]}, "> 0.0"),
        ({"links": [{"from": "a", "to": "b", "transport": "shm", "latency_s": 0}]}, "bytes_per_s"),
    ],
)
def test_what_is_no_hardware_file_is_refused_by_its_name(tmp_path: Path, content: object, told: str) -> None:
    path = written(tmp_path / "hw.json", content)
    with pytest.raises(ConfigError, match=told) as refused:
        read_hardware(path)
    assert str(path) in str(refused.value)


def test_a_file_that_cannot_be_read_or_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json: No such file"):
        read_hardware(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"No such file.*give another --out"):
        add_to_file(tmp_path / "none" / "hw.json", HARDWARE)


def test_a_model_that_only_the_classes_name_counts_too(tmp_path: Path) -> None:
    path = written(tmp_path / "hw.json", {"classes": [{"name": "h100", "model": "8B", "cost": COST}]})
    with pytest.raises(ConfigError, match="was measured with the model 8B, and this is smollm2"):
        add_to_file(path, HARDWARE)
    with pytest.raises(ConfigError, match="was measured with the model 8B"):
        read_hardware(path).require_model("smollm2", None, path)


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "hw.json"
    add_to_file(path, HARDWARE)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="steps take no time"):
        add_to_file(path, Hardware(classes=(ClassFile(name="idle", cost=CostModel(step_s=0.1)),)))
    assert path.read_bytes() == before


def test_classes_are_found_by_name_and_by_device() -> None:
    assert HARDWARE.fitting("cpu", 2).name == "cpu-2"
    with pytest.raises(ConfigError, match=r"no class of workers on cpu with 3 cores.*cpu-1 .cpu, cores: 1.*profile"):
        HARDWARE.fitting("cpu", 3)
    with pytest.raises(ConfigError, match=r"no class of workers on cuda"):
        HARDWARE.fitting("cuda", 1)
    with pytest.raises(ConfigError, match=r"no class 'cpu1'; there are cpu-1, cpu-2; did you mean cpu-1"):
        HARDWARE.named("cpu1")
    by_hand = Hardware(classes=(ClassFile(name="any", cost=COST),))
    assert by_hand.fitting("cuda", 1).name == "any"


def test_links_are_found_by_worker_before_class_and_by_transport_in_order() -> None:
    first = HARDWARE.link(("prefill-0", "cpu-1"), ("decode-0", "cpu-2"), "shm", "tcp")
    assert first is not None and first.bytes_per_s == 2e9
    tcp = HARDWARE.link(("prefill-0", "cpu-1"), ("decode-0", "cpu-2"), "tcp")
    assert tcp is not None and tcp.bytes_per_s == 1e9
    by_class = HARDWARE.link(("prefill-1", "cpu-1"), ("decode-1", "cpu-2"), "shm", "tcp")
    assert by_class is not None and by_class.bytes_per_s == 9e8
    assert HARDWARE.link(("decode-0",), ("prefill-0",), "shm", "tcp") is None


def test_the_typical_link_is_the_median_over_pairs_each_by_its_fastest_transport() -> None:
    assert HARDWARE.typical(same_machine=False) is None
    slow = Hardware(links=(*HARDWARE.links[:2], link("a", "b", "tcp", 1e8, same=False)))
    assert slow.typical(same_machine=True) == LinkCost(0.002, 2e9)
    assert slow.typical(same_machine=True, transports=("tcp",)) == LinkCost(0.002, 1e9)
    assert slow.typical(same_machine=False) == LinkCost(0.002, 1e8)


# ---------------------------------------------------------------- simulate


def simulated(path: Path, out: Path, **flags: Any) -> dict[str, Any]:
    settings = {"levels": "r2", "requests": 8, "seeds": 1, "jobs": 1, "policies": "disaggregated", "json": str(out)}
    simulate(hardware=path, **(settings | flags))
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_simulate_takes_classes_by_name_and_the_first_by_default(tmp_path: Path) -> None:
    path, out = tmp_path / "hw.json", tmp_path / "out.json"
    add_to_file(path, HARDWARE)
    [one] = simulated(path, out)["hardware"]["classes"]
    assert (one["name"], one["file"], one["kv_tokens"]) == ("cpu-1", str(path), 50_000)
    report = simulated(path, out, pool=("prefill=1xcpu-2", "decode=2xcpu-1"))
    assert [one["name"] for one in report["hardware"]["classes"]] == ["cpu-2", "cpu-1"]
    assert report["cells"][0]["workers"] == 3


def test_simulate_takes_the_links_of_the_file_unless_told_another(tmp_path: Path) -> None:
    path, out = tmp_path / "hw.json", tmp_path / "out.json"
    add_to_file(path, msgspec.structs.replace(HARDWARE, links=(link("a", "b", rate=1e6),)))

    def tpot(**flags: Any) -> float:
        found: float = simulated(path, out, workload="summarise", **flags)["cells"][0]["tpot_s"]["mean"]["median"]
        return found

    # 23 KB of KV a token: at 1 MB/s a prompt of a thousand tokens takes 23 s to hand over.
    assert tpot() > 10 * tpot(local_link="4GB")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"pool": ("prefill=1xcpu1", "decode=1xcpu-2")}, "no class 'cpu1'.*did you mean cpu-1"),
        ({"cost_model": Path("x.json")}, "give one of them"),
    ],
)
def test_simulate_refuses_what_does_not_go_together(tmp_path: Path, flags: dict[str, Any], told: str) -> None:
    path = tmp_path / "hw.json"
    add_to_file(path, HARDWARE)
    with pytest.raises(ConfigError, match=told):
        simulated(path, tmp_path / "out.json", **flags)


def test_simulate_refuses_files_without_classes_and_classes_of_several_models(tmp_path: Path) -> None:
    links = tmp_path / "links.json"
    add_to_file(links, Hardware(links=HARDWARE.links))
    with pytest.raises(ConfigError, match=r"links.json has no class of workers"):
        simulated(links, tmp_path / "out.json")
    with pytest.raises(ConfigError, match=r"has no class of workers, only links; give it as --hardware"):
        read_class(links)
    path, other = tmp_path / "hw.json", written(tmp_path / "big.json", ClassFile(name="big", model="8B", cost=COST))
    add_to_file(path, msgspec.structs.replace(HARDWARE, classes=(ClassFile(name="a", cost=COST, model="smollm2"),)))
    with pytest.raises(ConfigError, match=r"hw.json is a cost model of smollm2, .*big.json of 8B"):
        simulated(path, tmp_path / "out.json", pool=("prefill=1xa", f"decode=1x{other}"))
