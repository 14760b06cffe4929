"""Where a router may listen for workers: not at another's address, but in place of what one that is gone has left."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from bascule.errors import ConfigError
from bascule.router.link import RouterLink
from bascule.types import Epoch, WorkerId
from bascule.wire import Goodbye, WorkerMessage
from bascule.worker.link import RouterSocket

BOUND_S = 20.0


async def heard_by(link: RouterLink) -> WorkerMessage:
    """The first message of a worker that connects to the link's address."""
    heard: asyncio.Future[WorkerMessage] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(link.serve(lambda _, message: heard.done() or heard.set_result(message)))
    worker = RouterSocket(link.address, Epoch("w-1"))
    try:
        worker.send(Goodbye(WorkerId("w"), Epoch("w-1")))
        return await asyncio.wait_for(heard, BOUND_S)
    finally:
        serving.cancel()
        worker.close()


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_second_router_ends_with_a_line_and_the_first_is_still_joined(kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        first = RouterLink(f"ipc://{tmp_path}/router" if kind == "ipc" else "tcp://127.0.0.1:*")
        try:
            with pytest.raises(ConfigError) as caught:
                RouterLink(first.address)
            assert str(caught.value) == (
                f"cannot listen for workers at {first.address}: address already in use; choose another address"
            )
            assert await heard_by(first) == Goodbye(WorkerId("w"), Epoch("w-1"))
        finally:
            first.close()

    asyncio.run(run())


def test_a_socket_whose_queue_is_full_is_anothers(tmp_path: Path) -> None:
    path = str(tmp_path / "router")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)

        async def run() -> None:
            with pytest.raises(ConfigError, match="address already in use"):
                RouterLink(f"ipc://{path}")

        asyncio.run(run())


def test_what_a_router_that_is_gone_has_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "router"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
        gone.listen()
    assert path.is_socket()

    async def run() -> None:
        link = RouterLink(f"ipc://{path}")
        try:
            assert await heard_by(link) == Goodbye(WorkerId("w"), Epoch("w-1"))
        finally:
            link.close()

    asyncio.run(run())


def test_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")

    async def run() -> None:
        with pytest.raises(ConfigError, match="address already in use; choose another address"):
            RouterLink(f"ipc://{path}")

    asyncio.run(run())
    assert path.read_text() == "mine"
