"""What is wrong before anything runs: said by `doctor`, by what starts, and by the router, in the same one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from bascule.bench.apart import started
from bascule.bench.namespaces import Cable, Host
from support.cluster import run_cli, run_clis
from support.hosts import HERE, MOCK, OURS, START_S, free_port, router, router_on, until, worker

OTHERWISE = """
import sys, time
from bascule import wire
now, time.time = time.time, lambda: now() + {ahead}
import bascule
bascule.__version__ = {release!r}
wire.VERSION += {newer}
from bascule.cli.main import main
main()
"""
CLOCK = r"the clock of this host is (99|100)\.\d s behind the router's"
"""A hundred seconds, less what lies between the router's answer and the look at the clock."""
TRIES = 3
"""A process that stands still for seconds is told of as silent, or as having another clock: then doctor asks again."""
UNREACHED = "198.51.100.2"
"""An address of the far host, packets to which are lost on their way from the near one."""


def otherwise(ahead: float = 0.0, release: str = "0.0.1", newer: int = 0) -> tuple[str, ...]:
    """The first words of a command of another release, on a machine whose clock is off."""
    return sys.executable, "-c", OTHERWISE.format(ahead=ahead, release=release, newer=newer)


def again(done: subprocess.CompletedProcess[str], shown: str, *command: str) -> subprocess.CompletedProcess[str]:
    """`done`, or the command's next try, until one prints what matches `shown` (whatever lines' ends)."""
    for _ in range(TRIES - 1):
        if re.search(shown, " ".join(done.stdout.split())):
            break
        done = run_cli(*command)
    return done


def wrong(text: str) -> list[str]:
    """What doctor found to be in the way."""
    return [line.removeprefix("WRONG  ") for line in text.splitlines() if line.startswith("WRONG")]


def doubted(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("DOUBT"))


def test_doctor_and_serve_refuse_a_machine_with_the_same_line(tmp_path: Path) -> None:
    config, report = tmp_path / "bascule.toml", tmp_path / "report.json"
    config.write_text('queue-limit = 2000\nengine = "mock"\nmixed = 1\npolicy = "replicated"\nport = 0\n')
    few = ("bash", "-c", 'ulimit -n 200; exec "$@"', "bash", *OURS)
    doctor, serve = (
        subprocess.run(
            [*few, *command, "--config", str(config)], capture_output=True, text=True, timeout=START_S, check=False
        )
        for command in (["doctor", "smollm2", "--json", str(report)], ["serve", "smollm2"])
    )
    worker_line, router_line = wrong(doctor.stdout)
    assert worker_line.startswith("200 open files are allowed here, 640 are what a worker may need")
    assert "2192 are what the router may need" in router_line
    found = [each for each in json.loads(report.read_text()) if each["level"] == "wrong"]
    assert [f"{each['what']}; {each['mend']}" for each in found] == [worker_line, router_line]
    assert doctor.returncode == 1 and serve.returncode == 2
    assert serve.stderr.splitlines()[-1] == f"bascule: {worker_line}"


def test_who_has_read_enough_of_what_is_said_sees_no_traceback() -> None:
    command = [*OURS, "doctor", "smollm2", "--engine", "mock", "--json", "-"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as nobody:
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=START_S, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.key"
    assert run_cli("cluster-key", str(path)).returncode == 0
    return path


def test_doctor_says_what_a_worker_would_meet_at_a_router_and_it_does(tmp_path: Path, key: Path) -> None:
    joins = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    with_key, logs = ("--cluster-key-file", str(key)), []
    with ExitStack() as stack:
        for index, begin in enumerate((OURS, otherwise(ahead=100, newer=1))):
            (folder := tmp_path / str(index)).mkdir()
            _, log = stack.enter_context(
                router_on(HERE, joins[index], folder, *(with_key if index == 0 else ()), begin=begin)
            )
            logs.append(log)
        until(lambda: all("start workers with" in log.read_text() for log in logs), "not both listen", logs)
        late = ("worker", "smollm2", "--join", joins[0], "--id", "late", *with_key, *MOCK)
        stack.enter_context(started(HERE, tmp_path / "late.log", *late, begin=otherwise(ahead=-50)))
        ask = ("doctor", "smollm2", *MOCK, "--kv-memory=64MiB", "--join")
        locked_out, refused, nobody, other, let_in = run_clis(
            [*ask, joins[0]],
            ["worker", "smollm2", "--join", joins[1], "--id", "w", *MOCK],
            [*ask, f"tcp://127.0.0.1:{free_port()}"],
            [*ask, joins[1]],
            [*ask, joins[0], *with_key],
        )
        locked_out = again(locked_out, "give router and workers the same", *ask, joins[0])
        other = again(other, CLOCK, *ask, joins[1])
        until(lambda: "the clock of worker late is" in told(logs[0]), "nobody is told of its clock", logs)
        differing = ("--block-size=32", "--max-model-len=100", "--transfer-codec=int8")
        alike, differs = run_clis([*ask, joins[0], *with_key], [*ask, joins[0], *with_key, *differing])
        alike = again(alike, "workers connect to this host", *ask, joins[0], *with_key)
        admin = told(logs[0]).split("admin API at ")[1].split()[0]
        [one] = httpx.get(f"{admin}/admin/state", timeout=START_S).json()["workers"]
    assert 49 < one["clock_skew_s"] < 52
    assert "worker late is of bascule 0.0.1" in told(logs[0])
    assert let_in.returncode == 0, let_in.stdout
    assert "the router connects back to 127.0.0.1" in let_in.stdout and "vocabulary is that of" in let_in.stdout
    assert alike.returncode == 0 and "context and codecs are those of the cluster's workers" in alike.stdout
    assert "this host connects to the cluster's workers (1 tried)" in alike.stdout
    assert "the cluster's workers connect to this host (1 tried)" in alike.stdout
    assert differs.returncode == 1
    assert wrong(differs.stdout) == [
        "block size 32 here, 16 at the cluster's workers; start all workers with the same --block-size",
        "context length 100 here, 8192 at the cluster's workers; start all workers with the same --max-model-len",
        "KV codecs push-int8 here, none at the cluster's workers; start all workers with the same --kv-codec and "
        "--transfer-codec",
        "--transfer-codec: codec int8 needs KV of float32, bfloat16, float16, and this KV is uint8; use none",
    ]
    assert [locked_out.returncode, nobody.returncode, other.returncode] == [1, 1, 1]
    assert "give router and workers the same --cluster-key-file" in wrong(locked_out.stdout)[0]
    assert "(connection refused) cannot be reached; start it, mend --join" in wrong(nobody.stdout)[0]
    [version] = wrong(other.stdout)
    assert version.endswith("there; run the same release of bascule on both")
    assert "0.0.1 there; run the same release on all hosts" in doubted(other.stdout)
    assert re.search(CLOCK, doubted(other.stdout))
    assert refused.returncode == 1 and "worker w speaks protocol version" in refused.stderr


def told(log: Path) -> str:
    """What a log says, whatever its lines' ends."""
    return " ".join(log.read_text().split())


@contextmanager
def one_way_only(cable: Cable) -> Iterator[None]:
    """The far host has one address more, and what the near one sends there is lost, as in a firewall."""
    with ExitStack() as stack:
        ways: list[tuple[Host, str, str]] = [
            (cable.far, "address {} " + UNREACHED + "/32 dev lo", "add"),
            (cable.near, "neighbour {} 192.0.2.9 lladdr 02:00:00:00:00:03 dev cable", "replace"),
            (cable.near, "route {} " + UNREACHED + " via 192.0.2.9 dev cable onlink", "add"),
        ]
        for host, what, verb in ways:
            with host.inside():
                subprocess.run(["ip", *what.format(verb).split()], check=True, timeout=10)
            stack.callback(undo, host, ["ip", *what.format("del").split()])
        yield


def undo(host: Host, command: list[str]) -> None:
    with host.inside():
        subprocess.run(command, check=True, timeout=10)


def test_a_worker_that_cannot_be_reached_where_it_says_is_refused(cable: Cable, tmp_path: Path, key: Path) -> None:
    with_key = ("--cluster-key-file", str(key))
    with one_way_only(cable), router(cable, tmp_path, *with_key) as (join, ready, log):
        until(lambda: "start workers with" in log.read_text(), "the router does not listen", [log])
        cases = (("mixed", "127.0.0.1", "connection refused"), ("decode", UNREACHED, "no answer within 2 s"))
        doctor = ("doctor", "smollm2", *MOCK, "--kv-memory=64MiB", "--join", join, *with_key, "--host", UNREACHED)
        with ExitStack() as stack:
            children = [
                stack.enter_context(worker(cable, tmp_path, join, True, role, *with_key, address=address))
                for role, address, _ in cases
            ]
            children.append(stack.enter_context(started(cable.far, tmp_path / "doctor.log", *doctor)))
            assert [child.wait(START_S) for child in children] == [1, 1, 1]
        for role, address, why in cases:
            said = (tmp_path / f"{role}.log").read_text()
            assert f"the router cannot connect to worker {role} at tcp://{address}:" in said
            assert f"({why}): give it --host with an address of its machine" in said
        [line] = wrong((tmp_path / "doctor.log").read_text())
        assert f"the router cannot connect to this host at {UNREACHED}:" in line and "within 2 s); give --host" in line
        assert not ready.exists()


def test_doctor_tells_which_worker_cannot_connect_to_this_host_though_the_router_can(
    cable: Cable, tmp_path: Path, key: Path
) -> None:
    with_key, join = ("--cluster-key-file", str(key)), f"tcp://{cable.far.address}:8100"
    with one_way_only(cable), ExitStack() as stack:
        ready, log = stack.enter_context(router_on(cable.far, join, tmp_path, *with_key))
        until(lambda: "start workers with" in log.read_text(), "the router does not listen", [log])
        stack.enter_context(worker(cable, tmp_path, join, False, "mixed", *with_key))
        until(ready.exists, "no worker has joined", [log, tmp_path / "mixed.log"])
        doctor = ("doctor", "smollm2", *MOCK, "--kv-memory=64MiB", "--join", join, *with_key, "--host", UNREACHED)
        said = tmp_path / "doctor.log"
        for _ in range(TRIES):
            with started(cable.far, said, *doctor) as asking:
                assert asking.wait(START_S) == 0, said.read_text()
            if "did not tell in time" not in (text := said.read_text()):
                break
    assert f"the router connects back to {UNREACHED}" in text
    assert f"--join {join} --host ADDRESS_OF_ITS_MACHINE --cluster-key-file FILE" in told(log)
    assert "this host connects to the cluster's workers (1 tried)" in text
    assert f"worker mixed cannot connect to this host at {UNREACHED}:" in doubted(text)
    assert "(no answer within 2 s); check --host, and the firewalls between" in doubted(text)


@pytest.mark.full
def test_nothing_is_split_over_workers_of_which_one_does_not_reach_the_other(
    cable: Cable, tmp_path: Path, key: Path
) -> None:
    flags = ("--cluster-key-file", str(key))
    with one_way_only(cable), ExitStack() as stack:
        join, ready, log = stack.enter_context(router(cable, tmp_path, *flags, "--no-check-reach"))
        logs = [log, tmp_path / "prefill.log", tmp_path / "decode.log"]
        stack.enter_context(worker(cable, tmp_path, join, False, "prefill", *flags))
        stack.enter_context(worker(cable, tmp_path, join, True, "decode", *flags, address=UNREACHED))
        until(ready.exists, "no worker has joined", logs)
        content = json.loads(ready.read_text())
        with cable.near.inside(), httpx.Client(timeout=START_S) as client:

            def unreachable() -> str:
                workers = client.get(f"{content['admin_url']}/admin/state").json()["workers"]
                return "".join(one["unreachable"].get("decode", "") for one in workers)

            until(lambda: UNREACHED in unreachable(), "nobody has found out", logs)
            body = {"model": content["model"], "prompt": [7] * 2000, "max_tokens": 4, "ignore_eos": True}
            answer = client.post(f"{content['url']}/v1/completions", json=body)
            [decision] = client.get(f"{content['admin_url']}/admin/decisions").json()["decisions"]
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        assert answer.headers["X-Bascule-Route"].startswith("local;")
        assert "no prefill worker can connect to a decode worker" in decision["reason"]
        said = logs[1].read_text()
        assert "it cannot be reached" not in said and "no blocks were granted" not in said, "no handoff was tried"
        assert "worker prefill cannot connect to worker decode" in told(log)
