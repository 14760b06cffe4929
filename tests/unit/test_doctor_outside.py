"""What doctor says of servers that others run: real Redis servers, and real HTTP servers that are to be attached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bascule.cli.fitness import Finding, Level
from bascule.cli.outside import of_servers
from bascule.config import AttachConfig, StoreConfig
from support.hosts import free_port
from support.redis_server import redis_process

NOWHERE = f"127.0.0.1:{free_port()}"


def of_store(urls: str) -> list[Finding]:
    return list(of_servers(StoreConfig(kv_remote=urls), AttachConfig(), "smollm2"))


def of_attached(url: str) -> Finding:
    (finding,) = of_servers(StoreConfig(), AttachConfig(attach=url), "smollm2")
    return finding


def test_a_store_that_answers_is_fine_and_one_that_does_not_is_in_doubt() -> None:
    with redis_process() as server:
        fine, gone = of_store(f"{server.url},redis://{NOWHERE}")
    assert fine.level is Level.OK
    assert gone.level is Level.DOUBT
    assert f"{NOWHERE}/0 cannot be connected to (Error 111 connecting" in gone.line


@pytest.mark.parametrize(
    ("policy", "bound", "fits"),
    [
        ("volatile-ttl", "64mb", True),
        ("allkeys-lfu", "64mb", False),
        ("noeviction", "64mb", False),
        ("noeviction", "0", True),
    ],
)
def test_a_store_that_evicts_in_another_order_is_in_doubt(policy: str, bound: str, fits: bool) -> None:
    with redis_process("--maxmemory", bound, "--maxmemory-policy", policy) as server:
        answers, *doubts = of_store(server.url)
    assert answers.level is Level.OK
    assert [doubt.level for doubt in doubts] == ([] if fits else [Level.DOUBT])
    assert all(f"has maxmemory-policy {policy}; make it volatile-ttl" in doubt.line for doubt in doubts)


def test_a_store_that_wants_another_password_is_in_doubt_and_no_password_is_said() -> None:
    with redis_process("--requirepass", "right") as server:
        address = server.url.removeprefix("redis://").rpartition("@")[2]
        (refused,) = of_store(f"redis://:wrong-one@{address}")
    assert refused.level is Level.DOUBT
    assert "refuses us" in refused.line
    assert "wrong-one" not in refused.line


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, bytes]]]:
    """An HTTP server's URL, and what it answers to `/v1/models`."""
    body = {"": b"{}"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(301 if "Location" in body else 200)
            if "Location" in body:
                self.send_header("Location", body["Location"].decode())
            self.send_header("Content-Length", str(len(body[""])))
            self.end_headers()
            self.wfile.write(body[""])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", body
        server.shutdown()


def test_an_attached_server_is_asked_for_the_model(answers: tuple[str, dict[str, bytes]]) -> None:
    url, body = answers
    body[""] = b'{"data": [{"id": "smollm2", "max_model_len": 2048}]}'
    assert of_attached(url) == Finding(Level.OK, f"{url} serves smollm2")
    body[""] = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    assert of_attached(url).level is Level.WRONG
    assert "none is called 'smollm2'" in of_attached(url).line
    body[""] = b'{"data": []}'
    assert of_attached(url).level is Level.DOUBT
    body[""] = b"<html>"
    assert "no OpenAI-compatible server" in of_attached(url).line


def test_an_attached_server_that_leads_nowhere_is_in_doubt(answers: tuple[str, dict[str, bytes]]) -> None:
    url, body = answers
    body["Location"] = b"ftp:\\"
    assert of_attached(url).level is Level.DOUBT


def test_an_attached_server_that_is_not_there_is_in_doubt() -> None:
    finding = of_attached(f"http://{NOWHERE}")
    assert finding.level is Level.DOUBT
    assert "does not answer" in finding.line and "start it" in finding.line
