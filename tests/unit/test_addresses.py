"""What `--bind` and `--join` take for an address, and what every command says of all else."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from cli_rig import runner

from bascule.addresses import check_address
from bascule.errors import ConfigError

EVERYWHERE = ["tcp://127.0.0.1:1", "tcp://localhost:65535", "tcp://node_1.lan:8100", "ipc:///tmp/x"]
TO_LISTEN = ["tcp://*:8100", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://*:*"]
NOWHERE = [
    "tcp://127.0.0.1:99999",
    "tcp://127.0.0.1:65536",
    "tcp://127.0.0.1:-1",
    "tcp://127.0.0.1:+1",
    "tcp://127.0.0.1:8100/",
    "tcp://127.0.0.1:http",
    "tcp://127.0.0.1:",
    "tcp://127.0.0.1",
    "tcp://:8100",
    "tcp://::1",
    "tcp://[]:8100",
    "tcp://[::1:8100",
    "127.0.0.1:18100",
    "http://127.0.0.1:8100",
    "tcp://127.0.0.1: 8100",
    "ipc://",
    "",
]


@pytest.fixture
def logs_again() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("given", EVERYWHERE)
def test_an_address_is_taken(given: str) -> None:
    check_address("--bind", given, listens=True)
    check_address("--join", given)


@pytest.mark.parametrize("given", TO_LISTEN)
def test_a_free_port_and_all_hosts_are_for_those_who_listen(given: str) -> None:
    check_address("--bind", given, listens=True)
    with pytest.raises(ConfigError, match="is no address"):
        check_address("--join", given)


@pytest.mark.parametrize("given", NOWHERE)
def test_what_is_no_address_is_refused_with_one(given: str) -> None:
    for listens in (False, True):
        with pytest.raises(ConfigError) as caught:
            check_address("--bind", given, listens=listens)
        assert f"--bind {given!r} is no address; write for example tcp://127.0.0.1:8100" in str(caught.value)


@pytest.mark.parametrize("host", ["[::1]", "[2001:db8::1]", "[fe80::1%eth0]"])
def test_an_ipv6_address_is_refused_as_what_it_is(host: str) -> None:
    for given in (f"tcp://{host}:8100", f"tcp://{host}:*", f"tcp://{host}:0"):
        with pytest.raises(ConfigError, match="over IPv4 only; give an IPv4 address or a name that has one") as caught:
            check_address("--bind", given, listens=True)
        assert str(caught.value).startswith(f"--bind {given}: ")


@pytest.mark.usefixtures("logs_again")
@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        ("router", ["--bind=tcp://[::1]:0"], "--bind tcp://[::1]:0"),
        ("worker", ["--join=tcp://[::1]:8100"], "--join tcp://[::1]:8100"),
        ("worker", ["--join=tcp://127.0.0.1:8100", "--host=::1"], "--host ::1"),
        ("worker", ["--join=tcp://127.0.0.1:8100", "--host=[::1]"], "--host [::1]"),
        ("doctor", ["--join=tcp://[::1]:8100"], "--join tcp://[::1]:8100"),
        ("doctor", ["--join=tcp://127.0.0.1:8100", "--host=::1"], "--host ::1"),
    ],
)
def test_each_command_refuses_ipv6_in_the_same_words(
    command: str, flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starts(*_: object) -> None:
        raise AssertionError("it starts")

    monkeypatch.setattr("bascule.cli.worker.run", starts)
    monkeypatch.setattr("bascule.cli.router._run", starts)
    monkeypatch.setattr("bascule.cli.doctor.joining", starts)
    name = ["--id=w"] if command == "worker" else []
    code, out, error = runner(monkeypatch, capsys, command)("nowhere", *flags, *name)
    assert code == (1 if command == "doctor" else 2)
    line = f"{named}: router and workers talk over IPv4 only; give an IPv4 address or a name that has one"
    assert line in " ".join((out + error).split())


@pytest.mark.usefixtures("logs_again")
@pytest.mark.parametrize("given", ["tcp://127.0.0.1:99999", "tcp://127.0.0.1:-1", "tcp://127.0.0.1", "127.0.0.1:18100"])
@pytest.mark.parametrize(("command", "flag"), [("router", "--bind"), ("worker", "--join"), ("doctor", "--join")])
def test_each_command_names_the_flag_before_anything_starts(
    given: str, command: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starts(*_: object) -> None:
        raise AssertionError("it starts")

    monkeypatch.setattr("bascule.cli.worker.run", starts)
    monkeypatch.setattr("bascule.cli.router._run", starts)
    name = ["--id=w"] if command == "worker" else []
    code, out, error = runner(monkeypatch, capsys, command)("nowhere", f"{flag}={given}", *name)
    assert code == (1 if command == "doctor" else 2)
    assert f"{flag} {given!r} is no address; write for example tcp://127.0.0.1:8100" in " ".join((out + error).split())
