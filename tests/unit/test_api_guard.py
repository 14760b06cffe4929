"""Keys and TLS: who is answered, what the others are told, and files that do not go together."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from api_rig import WAIT, ApiRig
from test_api_decisions import add
from test_observe_decisions import record

from bascule.api.app import create_app
from bascule.api.calls import Calls
from bascule.api.server import HttpServer
from bascule.api.tls import tls_context
from bascule.cli import keys, servers
from bascule.cli.admin_api import NotAnswered
from bascule.cli.explain import explain
from bascule.config import HttpConfig
from bascule.errors import ConfigError
from bascule.keys import write_private
from support.certificates import certify

FIRST, SECOND, ADMIN = "first-key-1", "second-key-2", "admin-key-3"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for name in ("BASCULE_ADMIN", keys.ADMIN_KEY, keys.API_KEY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rig() -> Iterator[ApiRig]:
    with ApiRig(api_keys=(FIRST, SECOND), admin_keys=(ADMIN,)) as rig:
        yield rig
    rig.assert_nothing_runs()


def bearing(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


@pytest.mark.parametrize("key", [FIRST, SECOND])
def test_whoever_brings_one_of_the_keys_is_answered(rig: ApiRig, key: str) -> None:
    client = openai.OpenAI(base_url=f"{rig.server.url}/v1", api_key=key, max_retries=0, timeout=WAIT)
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=3).choices[0].text == "abc"
    assert rig.http.get("/v1/models", headers=bearing(key, "bEaReR")).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearing("first-key-"),
        bearing("first-key-12"),
        bearing(ADMIN),
        {"Authorization": "Bearer"},
        bearing(FIRST, "Basic"),
        {"Authorization": FIRST},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-Api-Key": FIRST},
    ],
)
def test_all_others_get_401_in_openais_form_and_nothing_is_started(rig: ApiRig, headers: dict[str, str]) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        answer = rig.http.post(path, json={"model": "tiny", "prompt": "abc"}, headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key" and answer.headers["X-Request-Id"]
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/nothing"):
        assert rig.http.get(path, headers=headers).status_code == 401
    assert rig.backend.requests == []
    with pytest.raises(openai.AuthenticationError):
        rig.client.models.list()


def test_probes_need_no_key(rig: ApiRig) -> None:
    assert [rig.http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
    assert httpx.get(f"{rig.admin.url}/health").status_code == 200


def test_a_body_that_is_still_coming_does_not_get_past_the_guard(rig: ApiRig) -> None:
    answer = rig.http.post("/v1/completions", content=b"[" * (4 << 20), headers=bearing("wrong"))
    assert answer.status_code == 401
    assert rig.http.get("/v1/models", headers=bearing(FIRST)).status_code == 200


def test_the_admin_api_has_a_key_of_its_own(rig: ApiRig) -> None:
    for path in ("/admin/state", "/admin/decisions"):
        assert httpx.get(f"{rig.admin.url}{path}", headers=bearing(FIRST)).status_code == 401
        assert httpx.get(f"{rig.admin.url}{path}", headers=bearing(ADMIN)).status_code == 200
    assert httpx.post(f"{rig.admin.url}/admin/workers/w/drain", headers=bearing(FIRST)).status_code == 401


def test_explain_brings_the_key_that_the_server_has_left_or_the_one_it_is_given(
    rig: ApiRig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(rig, record("r"))
    with pytest.raises(NotAnswered, match="BASCULE_ADMIN_KEY"):
        explain("r", admin=rig.admin.url)
    with monkeypatch.context() as environment:
        environment.setenv("BASCULE_ADMIN_KEY", ADMIN)
        explain("r", admin=rig.admin.url)
    path = servers.announce(rig.server.url, rig.admin.url, "tiny", ADMIN)
    assert path is not None and path.stat().st_mode & 0o777 == 0o600
    explain("r")
    explain("r", admin=f"{rig.admin.url}/")
    assert capsys.readouterr().out.count("chosen") == 3
    servers.withdraw(path)


def test_keys_come_from_flags_and_files_or_else_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    write_private(file, f"{SECOND}\n\n".encode())
    monkeypatch.setenv(keys.API_KEY, "from-environment, another-of-them")
    assert keys.api_keys(HttpConfig()) == ("from-environment", "another-of-them")
    assert keys.api_keys(HttpConfig(api_key=FIRST, api_key_file=file)) == (FIRST, SECOND)
    assert keys.admin_keys(HttpConfig()) == ()
    assert FIRST not in repr(HttpConfig(api_key=FIRST, admin_key=FIRST))
    assert keys.key_in_shell(HttpConfig()) == "$BASCULE_API_KEY"
    assert keys.key_in_shell(HttpConfig(api_key=FIRST)) == "KEY", "it would stand in a log"
    (spaced := tmp_path / "my keys").write_text(f"{SECOND}\n{FIRST}\n")
    said = subprocess.run(
        ["bash", "-c", f'echo -n "{keys.key_in_shell(HttpConfig(api_key_file=spaced))}"'],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    assert said.stdout == SECOND


@pytest.mark.parametrize("given", ["", "short", "with space-in-it", "good-enough,", "ümläute-drin"])
def test_a_key_that_cannot_be_one_is_refused_and_not_told(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key.*openssl rand") as caught:
        keys.api_keys(HttpConfig(api_key=given))
    assert not given or given not in str(caught.value)


def test_files_of_keys_are_their_owners_alone_and_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    write_private(file, b"\n")
    with pytest.raises(ConfigError, match="holds no key"):
        keys.admin_keys(HttpConfig(admin_key_file=file))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"--admin-key-file.*chmod 600"):
        keys.admin_keys(HttpConfig(admin_key_file=file))


def test_an_open_api_is_remarked_upon() -> None:
    assert list(keys.doubts(HttpConfig(), (), ())) == []
    assert "asks for no key" in next(keys.doubts(HttpConfig(host="0.0.0.0"), (), ()))
    assert "without TLS" in next(keys.doubts(HttpConfig(host="0.0.0.0"), (FIRST,), (ADMIN,)))
    assert list(keys.doubts(HttpConfig(host="0.0.0.0", ssl_certfile=Path("x")), (FIRST,), (ADMIN,))) == []


def test_an_admin_api_that_is_open_beside_an_api_that_is_not_is_remarked_upon() -> None:
    [said] = keys.doubts(HttpConfig(), (FIRST,), ())
    assert "the admin API for none" in said and "--admin-key-file" in said


def test_a_tls_key_that_everybody_can_read_is_refused_and_one_of_a_group_is_remarked_upon(files: Path) -> None:
    key = files / "one.key"
    alone = HttpConfig(ssl_certfile=files / "one.pem", ssl_keyfile=key)
    try:
        for mode, told in ((0o600, 0), (0o640, 1)):
            key.chmod(mode)
            assert keys.tls_of(alone) is not None
            assert [f"chmod 600 {key}" in each for each in keys.doubts(alone, (FIRST,), (ADMIN,))] == [True] * told
        key.chmod(0o644)
        with pytest.raises(ConfigError, match=f"everybody on this machine can read the TLS key .*chmod 600 {key}"):
            keys.tls_of(alone)
    finally:
        key.chmod(0o600)
    both = files / "both.pem"
    both.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {both}"):
        keys.tls_of(HttpConfig(ssl_certfile=both))
    assert keys.tls_of(HttpConfig()) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates for loopback, with their keys."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        certify(folder, name, "-nodes")
    certify(folder, "locked", "-passout", "pass:secret")
    (folder / "both.pem").write_text((folder / "one.pem").read_text() + (folder / "one.key").read_text())
    (folder / "junk").write_text("junk")
    return folder


def test_the_api_speaks_https_to_those_who_trust_its_certificate_and_to_nobody_in_the_clear(files: Path) -> None:
    with ApiRig() as rig:
        tls = tls_context(files / "one.pem", files / "one.key")
        app = create_app(rig.context, (FIRST,))
        server = rig.call(HttpServer.start(app, Calls(), "127.0.0.1", 0, tls))
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(files / "one.pem"))
        with httpx.Client(base_url=server.url, verify=trusting, timeout=WAIT, headers=bearing(FIRST)) as client:
            whole = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 3})
            assert whole.json()["choices"][0]["text"] == "abc"
            body = {"model": "tiny", "prompt": "abc" * 10, "max_tokens": 201, "stream": True}
            chunks = [line for line in client.post("/v1/completions", json=body).text.split("\n\n") if line]
            assert chunks[-1] == "data: [DONE]" and len(chunks) > 201
            said = "".join(json.loads(chunk[6:])["choices"][0]["text"] for chunk in chunks[:-1])
            assert said == "abc" * 67
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=WAIT)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=WAIT)
        rig.call(server.stop())


def test_certificate_and_key_may_share_a_file_and_no_file_is_no_tls(files: Path) -> None:
    assert tls_context(files / "both.pem", None) is not None
    assert tls_context(None, None) is None


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("one.pem", "two.key", "the key of another certificate"),
        ("one.pem", None, r"holds no key; give .*--ssl-keyfile"),
        ("junk", "one.key", "--ssl-certfile .*junk holds no certificate"),
        ("one.pem", "junk", "--ssl-keyfile .*junk holds no key"),
        ("locked.pem", "locked.key", "needs a password"),
        ("none.pem", None, "--ssl-certfile: cannot read .*none.pem: No such file"),
        ("one.pem", "none.key", "--ssl-keyfile: cannot read"),
        (None, "one.key", "--ssl-keyfile needs --ssl-certfile"),
    ],
)
def test_files_that_do_not_go_together_are_named(
    files: Path, certificate: str | None, key: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tls_context(files / certificate if certificate else None, files / key if key else None)


def test_endless_headers_are_cut_off_and_long_ones_are_not() -> None:
    with ApiRig() as rig:
        assert rig.http.get("/health", headers={"X-Long": "a" * 50_000}).status_code == 200
        with socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Endless: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    connection.sendall(b"a" * 4096)
            with contextlib.suppress(ConnectionError):
                answer = connection.recv(1 << 16)
                assert answer.startswith(b"HTTP/1.1 431 ") and b"headers_too_large" in answer
        big = {"model": "tiny", "prompt": "a" * 300_000}
        assert rig.http.post("/v1/completions", json=big).status_code == 400
        assert rig.http.get("/health").status_code == 200
        rig.wait_for(lambda: len(rig.server._server.server_state.connections) == 1)


@pytest.mark.parametrize("endless", [b"X-Endless: " + b"a" * 4000 + b"\r\n", b"a" * 4096], ids=["many", "one"])
def test_endless_trailers_behind_a_body_are_cut_off(endless: bytes) -> None:
    """They are no part of the body, whose size is bounded elsewhere."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-First: "
    with ApiRig() as rig, socket.create_connection(("127.0.0.1", rig.server.port), timeout=WAIT) as connection:
        connection.sendall(head)
        with pytest.raises(ConnectionError):
            for _ in range(5000):
                connection.sendall(endless)


def test_a_long_body_in_small_chunks_is_no_endless_one() -> None:
    body = b'{"model": "tiny", "prompt": "' + b"a" * 30_000 + b'"}'
    with ApiRig() as rig:
        answer = rig.http.post("/v1/completions", content=(body[at : at + 1] for at in range(len(body))))
        assert answer.status_code == 400 and "tokens" in answer.text, answer.text
