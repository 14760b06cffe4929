"""`/v1/chat/completions`, by the unmodified `openai` client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from api_rig import KV_TOKENS, ApiRig, says

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> Iterator[ApiRig]:
    shared.backend.reset()
    yield shared
    shared.assert_nothing_runs()


def prompt_of(rig: ApiRig) -> str:
    return bytes(rig.backend.requests[-1].prompt).decode()


def test_a_chat_is_answered_by_the_assistant(rig: ApiRig) -> None:
    rig.backend.script = lambda request: says("Paris")
    answer = rig.client.chat.completions.create(model="tiny", messages=HELLO)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Paris", "stop")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("<user>hi"), 6)


def test_messages_go_through_the_template(rig: ApiRig) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "", "name": "me"},
    ]
    assert rig.chat(messages=messages).status_code == 200
    assert prompt_of(rig) == "<system>be brief<user>one two<assistant>three<user>"


def test_the_rest_of_the_room_is_the_default_length(rig: ApiRig) -> None:
    rig.backend.script = lambda request: says("x")
    assert rig.post("/v1/chat/completions", {"model": "tiny", "messages": HELLO}).status_code == 200
    assert rig.backend.requests[0].sampling.max_tokens == KV_TOKENS - len("<user>hi")


@pytest.mark.parametrize("fields", [{"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 9}])
def test_the_length_has_two_names_and_the_newer_one_wins(rig: ApiRig, fields: dict[str, int]) -> None:
    assert rig.chat(**fields).json()["usage"]["completion_tokens"] == 3


def test_logprobs_have_tokens_bytes_and_the_likeliest(rig: ApiRig) -> None:
    answer = rig.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "é"}], logprobs=True, top_logprobs=2, max_tokens=7
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    first, last = logprobs.content[0], logprobs.content[6]
    assert (first.token, first.bytes, first.logprob) == ("<", [60], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("<", -0.5), ("=", -1.5)]
    assert (last.token, last.bytes) == ("�", [0xC3])


def test_logprobs_without_top_logprobs_have_no_alternatives(rig: ApiRig) -> None:
    answer = rig.client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, max_tokens=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


def test_n_choices_have_their_indices(rig: ApiRig) -> None:
    answer = rig.client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in rig.backend.requests) == [5, 6, 7]


def test_what_asks_for_nothing_is_accepted(rig: ApiRig) -> None:
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert rig.chat(**fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "text"}, "response_format"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(rig: ApiRig, fields: dict[str, object], param: str) -> None:
    response = rig.chat(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert not rig.backend.requests


def test_a_refusing_template_is_the_clients_error(rig: ApiRig) -> None:
    with pytest.raises(openai.BadRequestError, match="users speak first"):
        rig.client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "x"}])
