"""Bad input and failures, each with a clear error of OpenAI's shape."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from api_rig import CONTEXT, KV_TOKENS, VOCAB, ApiRig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bascule.errors import DeadlineExceeded, Overloaded, Unavailable, WorkerFailure

MAX_BODY = 20_000


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig(max_body=MAX_BODY) as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> Iterator[ApiRig]:
    shared.backend.reset()
    yield shared
    shared.assert_nothing_runs()


def assert_shape(response: httpx.Response, status: int) -> dict[str, str]:
    """OpenAI's error shape and the request id; returns the error."""
    assert response.status_code == status, response.text
    assert response.headers["X-Request-Id"]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


BAD_PARAMETERS = [
    ("model", 3),
    ("prompt", 3),
    ("prompt", {}),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", True),
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("n", "1"),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", CONTEXT),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("min_tokens", "2"),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", False),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_p", []),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 1e-300),
    ("repetition_penalty", {}),
    ("presence_penalty", 2.1),
    ("presence_penalty", "1"),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", True),
    ("seed", "1"),
    ("seed", 1.0),
    ("seed", True),
    ("logprobs", 6),
    ("logprobs", -1),
    ("logprobs", True),
    ("best_of", 2),
    ("best_of", "1"),
    ("suffix", "end"),
    ("suffix", 1),
    ("echo", 1),
    ("echo", "yes"),
    ("stream", 1),
    ("stream_options", {}),
    ("ignore_eos", 0),
    ("return_token_ids", "no"),
    ("include_stop_str_in_output", 1),
    ("stop", 3),
    ("stop", ["a"] * 17),
    ("stop_token_ids", 3),
    ("stop_token_ids", [1] * 257),
    ("logit_bias", []),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(VOCAB): 1}),
    ("logit_bias", {"²": 1}),
    ("logit_bias", {str(key): 1 for key in range(1025)}),
    ("user", 3),
    ("metadata", "x"),
]

BAD_ITEMS = [
    ("prompt", [True], "prompt[0]"),
    ("prompt", ["a", ""], "prompt[1]"),
    ("prompt", ["a", 3], "prompt[1]"),
    ("prompt", [1, "a"], "prompt[1]"),
    ("prompt", [[1], []], "prompt[1]"),
    ("prompt", [[1], [1.0]], "prompt[1][0]"),
    ("prompt", [VOCAB], "prompt[0]"),
    ("prompt", [-1], "prompt[0]"),
    ("prompt", [[1, 2**70]], "prompt[0][1]"),
    ("stop", ["a", 3], "stop[1]"),
    ("stop", "", "stop[0]"),
    ("stop", ["x" * 513], "stop[0]"),
    ("stop_token_ids", [VOCAB], "stop_token_ids[0]"),
    ("stop_token_ids", [1, True], "stop_token_ids[1]"),
    ("logit_bias", {"5": 101}, "logit_bias.5"),
    ("logit_bias", {"5": "1"}, "logit_bias.5"),
    ("logit_bias", {"5": True}, "logit_bias.5"),
]


@pytest.mark.parametrize(
    ("name", "value", "param"), [*((name, value, name) for name, value in BAD_PARAMETERS), *BAD_ITEMS]
)
def test_a_bad_parameter_is_refused_by_name(rig: ApiRig, name: str, value: object, param: str) -> None:
    error = assert_shape(rig.complete(**{name: value}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"] or error["code"] == "context_length_exceeded"
    assert len(error["message"]) < 300
    assert not rig.backend.requests


@pytest.mark.parametrize("name", ["include_usage", "continuous_usage_stats"])
def test_bad_stream_options_are_refused_by_name(rig: ApiRig, name: str) -> None:
    error = assert_shape(rig.complete(stream=True, stream_options={name: 1}), 400)
    assert error["param"] == f"stream_options.{name}"


def test_echo_with_logprobs_is_refused(rig: ApiRig) -> None:
    assert assert_shape(rig.complete(echo=True, logprobs=1), 400)["param"] == "echo"


def test_too_many_outputs_in_one_request_are_refused(rig: ApiRig) -> None:
    assert assert_shape(rig.complete(prompt=["a"] * 3, n=100), 400)["param"] == "n"


def test_prompt_and_output_over_the_context_name_both_numbers(rig: ApiRig) -> None:
    error = assert_shape(rig.complete(prompt="a" * 150, max_tokens=CONTEXT - 149), 400)
    assert error["code"] == "context_length_exceeded"
    assert f"context is {CONTEXT} tokens" in error["message"]
    assert f"needs {CONTEXT + 1}: 150 of prompt and {CONTEXT - 149} of output" in error["message"]
    assert error["param"] == "max_tokens"


@pytest.mark.parametrize("size", [KV_TOKENS, CONTEXT, CONTEXT + 1])
def test_a_prompt_that_never_fits_is_refused(rig: ApiRig, size: int) -> None:
    error = assert_shape(rig.complete(prompt=[65] * size), 400)
    assert error["code"] == ("kv_memory_exceeded" if size < CONTEXT else "context_length_exceeded")
    assert error["param"] == "prompt"


def test_output_that_never_fits_the_kv_memory_is_refused(rig: ApiRig) -> None:
    error = assert_shape(rig.complete(max_tokens=KV_TOKENS - 2), 400)
    assert error["code"] == "kv_memory_exceeded"
    assert str(KV_TOKENS) in error["message"]
    assert rig.complete(max_tokens=KV_TOKENS - 3).status_code == 200


def test_while_no_worker_is_there_a_request_is_not_blamed_for_its_size(rig: ApiRig) -> None:
    rig.backend.kv_tokens = 0
    rig.backend.refusal = lambda request: Unavailable("no worker is ready")
    assert_shape(rig.complete(max_tokens=4), 503)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found(rig: ApiRig, path: str) -> None:
    error = assert_shape(rig.post(path, {"model": "gpt-9", "prompt": "a", "messages": []}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'tiny'" in error["message"]


def test_a_missing_model_or_prompt_is_said_to_be_missing(rig: ApiRig) -> None:
    assert "missing" in assert_shape(rig.post("/v1/completions", {"prompt": "a"}), 400)["message"]
    assert "missing" in assert_shape(rig.post("/v1/completions", {"model": "tiny"}), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\xff"}',
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a"} more',
        b"[" * 10_000,
        b'{"a":' * 3_000,
        b"[]",
        b'"text"',
        b"null",
        b"3",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(rig: ApiRig, body: bytes) -> None:
    error = assert_shape(rig.http.post("/v1/completions", content=body), 400)
    assert error["message"].startswith("The body")


def test_an_empty_body_is_called_that(rig: ApiRig) -> None:
    assert "empty" in assert_shape(rig.http.post("/v1/completions", content=b""), 400)["message"]


def test_a_body_that_never_ends_is_given_up(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bascule.api.body.BODY_SECONDS", 0.2)
    with socket.create_connection((rig.http.base_url.host, rig.http.base_url.port or 80), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_number_too_long_to_print_is_refused_like_any_other(rig: ApiRig) -> None:
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 4300 + b"}"
    error = assert_shape(rig.http.post("/v1/completions", content=body), 400)
    assert error["param"] == "max_tokens" and len(error["message"]) < 200


def test_a_clients_long_words_are_not_repeated_whole(rig: ApiRig) -> None:
    assert len(assert_shape(rig.complete(model="x" * 15_000), 404)["message"]) < 1200


@pytest.mark.parametrize("field", ["tools", "response_format"])
def test_completions_refuse_what_would_change_the_answer(rig: ApiRig, field: str) -> None:
    assert assert_shape(rig.complete(**{field: {"type": "other"}}), 400)["param"] == field


def test_invalid_utf8_is_called_that(rig: ApiRig) -> None:
    response = rig.http.post("/v1/completions", content=b'{"model": "tiny", "prompt": "\xc3\x28"}')
    assert "UTF-8" in assert_shape(response, 400)["message"]


def test_a_body_over_the_limit_is_refused_with_or_without_its_length(rig: ApiRig) -> None:
    body = json.dumps({"model": "tiny", "prompt": "a" * MAX_BODY}).encode()
    declared = rig.http.post("/v1/completions", content=body)
    assert str(MAX_BODY) in assert_shape(declared, 413)["message"]
    chunked = rig.http.post("/v1/completions", content=iter([body[:9000], body[9000:18000], body[18000:]]))
    assert assert_shape(chunked, 413)["code"] == "body_too_large"


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/v1/nothing"), ("GET", "/v1/models/")])
def test_unknown_paths_are_not_found(rig: ApiRig, method: str, path: str) -> None:
    assert_shape(rig.http.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/completions"), ("DELETE", "/v1/chat/completions"), ("POST", "/v1/models")]
)
def test_a_wrong_method_is_refused_and_the_right_one_named(rig: ApiRig, method: str, path: str) -> None:
    response = rig.http.request(method, path)
    error = assert_shape(response, 405)
    assert response.headers["Allow"].split(",")[0] in error["message"]


@pytest.mark.parametrize(
    ("failure", "status", "raised"),
    [
        (Overloaded("full", retry_after=7), 429, openai.RateLimitError),
        (Unavailable("none"), 503, openai.InternalServerError),
        (DeadlineExceeded("late", code="timeout"), 504, openai.InternalServerError),
        (WorkerFailure("died"), 500, openai.InternalServerError),
        (ZeroDivisionError("secret"), 500, openai.InternalServerError),
    ],
)
def test_failures_are_the_client_librarys_own_exceptions(
    rig: ApiRig, failure: Exception, status: int, raised: type[openai.APIStatusError]
) -> None:
    rig.backend.refusal = lambda request: failure
    with pytest.raises(raised) as caught:
        rig.client.completions.create(model="tiny", prompt="abc")
    assert caught.value.status_code == status
    assert "secret" not in str(caught.value)
    assert caught.value.response.headers.get("Retry-After") == ("7" if status == 429 else None)


def test_bad_requests_are_the_client_librarys_own_exceptions(rig: ApiRig) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        rig.client.completions.create(model="tiny", prompt="abc", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        rig.client.completions.create(model="other", prompt="abc")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        rig.client.models.retrieve("other")


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", "", "1_0", "3601", "1e300"])
def test_a_bad_timeout_header_is_refused(rig: ApiRig, header: str) -> None:
    response = rig.post("/v1/completions", {"model": "tiny", "prompt": "a"}, headers={"X-Request-Timeout": header})
    assert assert_shape(response, 400)["param"] == "X-Request-Timeout"


def test_requests_are_refused_while_no_worker_is_ready(rig: ApiRig) -> None:
    rig.backend.ready = False
    assert assert_shape(rig.complete(), 503)["code"] == "not_ready"
    rig.backend.card = None
    assert assert_shape(rig.complete(), 503)["code"] == "not_ready"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted(
    {name for name, _ in BAD_PARAMETERS} - {"model"}
    | {"messages", "tools", "response_format", "top_logprobs", "max_completion_tokens", "modalities", "tool_choice"}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON, "content": st.text() | JSON}
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
    prompt=st.text(max_size=5) | st.lists(st.integers(-2, VOCAB + 2), max_size=5) | JSON,
    messages=st.lists(MESSAGE, max_size=3),
)
def test_no_body_makes_the_server_fail(
    rig: ApiRig, path: str, fields: dict[str, object], prompt: object, messages: list[object]
) -> None:
    body = {"model": "tiny", "max_tokens": 3, "prompt": prompt, "messages": messages, **fields}
    response = rig.http.post(path, content=json.dumps(body).encode())
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert_shape(response, 400)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60))
def test_no_bytes_make_the_server_fail(rig: ApiRig, body: bytes) -> None:
    assert_shape(rig.http.post("/v1/completions", content=body), 400)
