"""Somebody on another host who speaks our protocols and has no key, at every port of a cluster that is at work."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from bascule.bench.namespaces import Cable
from bascule.engine.mock import mock_card
from bascule.keys import write_cluster_key, write_private
from bascule.kv.arena import Arena
from bascule.kv.transfer.base import Grant, machine_id
from bascule.kv.transfer.frames import (
    REPLY_BYTES,
    Header,
    Kind,
    Verdict,
    layout_digest,
    ticket_key,
    unpack_reply,
)
from bascule.kv.transfer.sealing import hello
from bascule.kv.transfer.tcp import TcpReceiver
from bascule.peer_wire import Abort, Fetch, Fetched, Prepare, Reserved, TransferEndpoint, from_peer
from bascule.types import Epoch, RequestId, SamplingParams, TicketId, WorkerId
from bascule.wire import VERSION, Goodbye, PeerAddress, Probe, Probed, encode, from_router
from chaos.truth import true_tokens
from support.hosts import START_S, router, until, worker

CARD = mock_card(context=8192, vocab=49152)
"""Of workers that stand in for smollm2."""
PROMPT = [23456] * 64
BLOCKS = len(PROMPT) // CARD.layout.block_size
OUTPUT = 400
API_KEY, ADMIN_KEY = "a-key-of-the-api", "a-key-of-the-admin"
SECRET = bytes(range(16))
PATIENCE_S = 2.0
"""For an answer that comes at once, or never."""
ANSWER_S = 8.0
"""For one of a router that first asks its workers in vain: it takes the stranger for one of them."""
HANDOFF, FETCH = TicketId("a-strangers-handoff"), TicketId("a-strangers-fetch")


@dataclass
class Site:
    """A cluster at work: the router and `decode` on the near host, `prefill` on the far one, where the stranger is."""

    cable: Cable
    folder: Path
    join: str
    url: str
    admin_url: str
    model: str

    def client(self) -> httpx.Client:
        """Has no key."""
        return httpx.Client(timeout=START_S)

    def state(self) -> dict[str, Any]:
        with self.cable.near.inside(), self.client() as client:
            answer = client.get(f"{self.admin_url}/admin/state", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["id"]: worker for worker in self.state()["workers"]}

    def log(self, name: str) -> str:
        return " ".join((self.folder / f"{name}.log").read_text().split())

    def body(self, tokens: int, **fields: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return body | {"return_token_ids": True} | fields

    def stream(self, tokens: list[int]) -> None:
        """Ask for all of a stream, and note the tokens as they come."""
        with self.cable.near.inside(), self.client() as client:
            key = {"Authorization": f"Bearer {API_KEY}"}
            body = self.body(OUTPUT, stream=True)
            with client.stream("POST", f"{self.url}/v1/completions", json=body, headers=key) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]


@contextmanager
def at_work(cable: Cable, folder: Path, *flags: str) -> Iterator[Site]:
    """From when both workers are there, and have the KV of the prompt."""
    folder.mkdir()
    for name, key in (("api", API_KEY), ("admin", ADMIN_KEY)):
        write_private(folder / name, key.encode())
    (folder / "cost.json").write_text('{"step_s": 0.02}')
    front = ("--policy=disaggregated", f"--host={cable.near.address}", *flags)
    front += (f"--api-key-file={folder / 'api'}", f"--admin-key-file={folder / 'admin'}")
    slow = (f"--cost-model={folder / 'cost.json'}", *flags)
    with (
        router(cable, folder, *front) as (join, ready, log),
        worker(cable, folder, join, True, "prefill", *slow),
        worker(cable, folder, join, False, "decode", *slow),
    ):
        logs = [log, folder / "prefill.log", folder / "decode.log"]
        until(ready.exists, "the router is not ready", logs)
        told = json.loads(ready.read_text())
        site = Site(cable, folder, join, told["url"], told["admin_url"], told["model"])
        until(lambda: len(site.workers()) == 2, "not both workers have joined", logs)
        with cable.near.inside(), site.client() as client:
            key = {"Authorization": f"Bearer {API_KEY}"}
            answer = client.post(f"{site.url}/v1/completions", json=site.body(2), headers=key)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Bascule-Route"] == "remote;prefill=prefill;decode=decode"
        yield site


@dataclass
class Heard:
    """What the stranger has got."""

    peer: list[Any] = field(default_factory=list)
    """Answers of `decode`."""
    router: list[Any] = field(default_factory=list)
    kv: bytes = b""
    """What was written into memory of its own."""
    verdicts: list[Verdict] = field(default_factory=list)
    """On an announcement in clear, and on one who begins to seal."""


class Stranger:
    """On the far host, as is the worker whose name it takes."""

    def __init__(self, site: Site) -> None:
        self.heard = Heard()
        self._site = site
        self._workers = site.workers()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        """Its first socket, and with it the threads that connect, are made on the far host."""
        peers, self._kv_port = self._ports(self._workers["decode"]["pid"])
        self._peers = f"tcp://{site.cable.near.address}:{peers}"

    def _ports(self, pid: int) -> tuple[int, int]:
        """Where a worker of the near host listens for messages, which it greets, and for KV, where it waits."""
        address = self._site.cable.near.address
        with self._site.cable.near.inside():
            open_ports = psutil.Process(pid).net_connections("tcp")
        ports = [each.laddr.port for each in open_ports if each.status == psutil.CONN_LISTEN]
        assert len(ports) == 2
        greeting = []
        for port in ports:
            with self._site.cable.far.inside(), socket.create_connection((address, port), PATIENCE_S) as connection:
                connection.settimeout(0.5)
                try:
                    greeting.append(len(connection.recv(10)))
                except TimeoutError:
                    greeting.append(0)
        assert sorted(greeting) == [0, 10]
        return (ports[0], ports[1]) if greeting[0] else (ports[1], ports[0])

    def knock(self) -> Heard:
        """Everywhere where something could be had."""
        with self._site.cable.far.inside(), Arena.create(CARD.layout, BLOCKS) as arena:
            receiver = TcpReceiver(arena, lambda _: None, self._site.cable.far.address)
            with closing(receiver):
                receiver.open(Grant(FETCH, SECRET, tuple(range(BLOCKS))))
                self.heard.peer = self._ask(self._peers, from_peer, self._handoff(), self._fetch(receiver))
                self.heard.kv = arena.bytes.tobytes()
            announced = Header(Kind.ANNOUNCE, ticket_key(HANDOFF), SECRET, layout_digest(CARD.layout))
            for said in (announced, hello(ticket_key(HANDOFF), layout_digest(CARD.layout))):
                self.heard.verdicts.append(self._push(said.pack()))
            epoch = Epoch(self._workers["decode"]["epoch"])
            leave = Goodbye(WorkerId("decode"), epoch)
            patience_s = ANSWER_S if self.heard.peer else PATIENCE_S
            self.heard.router = self._ask(
                self._site.join, from_router, Probe(VERSION), leave, name=epoch, patience_s=patience_s
            )
        return self.heard

    def insist(self, at: str, what: str) -> None:
        """Knock again until it stands in the log of `at` that the socket for `what` did not let anybody from here in.

        Of a client that hangs up first, which is a race, the listener learns neither the address nor a reason.
        """
        address = self._peers if at == "decode" else self._site.join
        line = f"the socket for {what} did not let {self._site.cable.far.address}:"

        def told() -> bool:
            with self._site.cable.far.inside():
                assert self._ask(address, from_peer, Abort(HANDOFF), patience_s=0.2) == []
            return line in self._site.log(at)

        until(told, f"{at} does not say whom it turned away", [self._site.folder / f"{at}.log"])
        assert "it has no cluster key" in self._site.log(at)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _handoff(self) -> Prepare:
        """Blocks of `decode` to write to."""
        return Prepare(
            ticket=HANDOFF,
            secret=SECRET,
            source=PeerAddress(WorkerId("prefill"), Epoch(self._workers["prefill"]["epoch"]), "tcp://192.0.2.2:9"),
            request=RequestId("a-strangers"),
            attempt=0,
            prompt=tuple(range(100, 164)),
            generated=(),
            sampling=SamplingParams(max_tokens=4),
            fingerprint=CARD.fingerprint,
            layout=CARD.layout,
        )

    def _fetch(self, receiver: TcpReceiver) -> Fetch:
        """The KV of somebody's prompt."""
        return Fetch(
            ticket=FETCH,
            secret=SECRET,
            worker=WorkerId("prefill"),
            fingerprint=CARD.fingerprint,
            layout=CARD.layout,
            tokens=tuple(PROMPT),
            have_blocks=0,
            blocks=tuple(range(BLOCKS)),
            endpoints=(TransferEndpoint("tcp", receiver.endpoint.address, machine_id()),),
        )

    def _ask(
        self, address: str, decode: Any, *messages: Any, name: str = "a-stranger", patience_s: float = PATIENCE_S
    ) -> list[Any]:
        """What is answered to messages in clear, in the name of some epoch."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, name.encode())
        dealer.connect(address)
        for message in messages:
            dealer.send(encode(message))
        found, deadline = [], time.monotonic() + patience_s
        while (left := deadline - time.monotonic()) > 0:
            if dealer.poll(1000 * left):
                found.append(decode(dealer.recv()))
        dealer.close(linger=0)
        return found

    def _push(self, said: bytes) -> Verdict:
        where = (self._site.cable.near.address, self._kv_port)
        with socket.create_connection(where, PATIENCE_S) as connection:
            connection.sendall(said)
            return unpack_reply(connection.recv(REPLY_BYTES, socket.MSG_WAITALL))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    write_cluster_key(tmp_path / "cluster.key")
    return tmp_path / "cluster.key"


def test_without_a_key_a_stranger_gets_kv_and_speaks_for_workers(cable: Cable, tmp_path: Path) -> None:
    """So that what follows is the key's doing: what the stranger says is understood."""
    with at_work(cable, tmp_path / "open", "--insecure") as site, closing(Stranger(site)) as stranger:
        heard = stranger.knock()
        fetched = next(each for each in heard.peer if isinstance(each, Fetched))
        assert any(isinstance(each, Reserved) for each in heard.peer)
        assert len(fetched.checksums) == BLOCKS and any(heard.kv)
        assert heard.verdicts == [Verdict.DONE, Verdict.NO_KEY]
        assert any(isinstance(each, Probed) for each in heard.router)
        until(lambda: "decode" not in site.workers(), "it was not believed", [])


def test_with_a_key_a_stranger_gets_nothing_and_disturbs_no_stream(cable: Cable, tmp_path: Path, key: Path) -> None:
    keyed = ("--cluster-key-file", str(key))
    with at_work(cable, tmp_path / "closed", *keyed) as site, closing(Stranger(site)) as stranger:
        before = {name: worker["epoch"] for name, worker in site.workers().items()}
        tokens: list[int] = []
        streaming = threading.Thread(target=site.stream, args=(tokens,))
        streaming.start()
        until(lambda: bool(tokens), "the stream has not begun", [])
        heard = stranger.knock()
        assert heard.peer == heard.router == [] and not any(heard.kv)
        assert heard.verdicts == [Verdict.NOT_SEALED, Verdict.UNKNOWN_TICKET]
        assert len(tokens) < OUTPUT, "the stream was over too soon to be disturbed"
        streaming.join(START_S)
        sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
        assert tokens == true_tokens(CARD.context, CARD.vocab, PROMPT, sampling, CARD.layout.layers)
        stranger.insist("decode", "peers")
        stranger.insist("router", "workers")
        until(lambda: site.workers()["decode"]["handoff_refused"] == {"not sealed": 1}, "it is not counted", [])
        state = site.state()
        assert {one["id"]: one["epoch"] for one in state["workers"]} == before
        assert state["integrity_violations"] == state["active"] == 0
        # As of their last heartbeat, which may be of before the stream's end.
        until(
            lambda: not any(one["kv_blocks_leased"] + one["promised"] for one in site.state()["workers"]),
            "blocks are held that nobody uses",
            [],
        )


def test_without_their_keys_the_api_and_the_admin_api_tell_nothing(cable: Cable, tmp_path: Path, key: Path) -> None:
    with at_work(cable, tmp_path / "closed", "--cluster-key-file", str(key)) as site:
        guesses = ({}, {"Authorization": "Bearer a-guess-of-a-key"}, {"Authorization": f"Bearer {ADMIN_KEY}"})
        with cable.far.inside(), site.client() as client:
            for guess in guesses:
                asked = [client.get(f"{site.url}{path}", headers=guess) for path in ("/v1/models", "/metrics")]
                asked.append(client.post(f"{site.url}/v1/completions", json=site.body(2), headers=guess))
                for answer in asked:
                    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            admin_port = int(site.admin_url.rpartition(":")[2])
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((cable.near.address, admin_port), PATIENCE_S)
        with cable.near.inside(), site.client() as client:
            for guess in ({}, {"Authorization": f"Bearer {API_KEY}"}):
                answer = client.get(f"{site.admin_url}/admin/state", headers=guess)
                assert answer.status_code == 401 and "workers" not in answer.json()
                refused = client.post(f"{site.admin_url}/admin/workers/decode/drain", headers=guess)
                assert refused.status_code == 401
        assert [one["state"] for one in site.workers().values()] == ["ready", "ready"]
