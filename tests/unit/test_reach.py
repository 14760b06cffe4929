"""Why an address does not answer, in words for a person."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from bascule.reach import first_unreachable

BOUND_S = 20.0


def why_not(address: str) -> str | None:
    return asyncio.run(first_unreachable([f"tcp://{address}"], BOUND_S))


def resolved(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Have every name stand for these addresses, or for none."""

    def look_up(_: object, port: int, *__: object, **___: object) -> list[Any]:
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)) for host in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_that_nobody_knows_is_told_of_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved(monkeypatch)
    assert why_not("gpu1:8100") == "tcp://gpu1:8100 (name or service not known)"


def test_a_name_none_of_whose_addresses_answers_is_told_of_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved(monkeypatch, "127.0.0.1", "127.0.0.2")
    with socket.socket() as silent:
        silent.bind(("0.0.0.0", 0))
        address = f"gpu1:{silent.getsockname()[1]}"
        assert why_not(address) == f"tcp://{address} (none of its addresses answers)"


def test_an_address_where_nothing_listens_refuses_and_one_that_listens_answers() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert why_not(address) == f"tcp://{address} (connection refused)"
        listener.listen()
        assert why_not(address) is None


@pytest.mark.parametrize("listens", [True, False])
def test_an_address_is_not_blamed_for_a_process_that_stands_still(listens: bool) -> None:
    async def run() -> str | None:
        trying = asyncio.create_task(first_unreachable([address], 0.4))
        asyncio.get_running_loop().call_soon(time.sleep, 0.5)
        return await trying

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if listens:
            listener.listen()
        assert asyncio.run(run()) == (None if listens else f"{address} (connection refused)")


def test_an_address_that_says_nothing_is_told_of() -> None:
    with socket.socket() as listener, socket.socket() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting.connect(listener.getsockname())
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert asyncio.run(first_unreachable([address], 0.4)) == f"{address} (no answer within 0.4 s)"
