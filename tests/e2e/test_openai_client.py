"""The unmodified `openai` client against a real split server: completions, chat, streaming, usage, errors."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from support.cluster import Cluster, serve

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serve("smollm2", "--dtype", "float32") as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models_lists_what_is_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_chat_answers_and_counts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=20)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert choice.message.content is not None and "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_has_the_same_text_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smollm2", prompt="Once upon a time", max_tokens=24, temperature=0)
    stream = client.completions.create(
        model="smollm2",
        prompt="Once upon a time",
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 24
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "A long beginning that comes again. " * 12
    first = client.completions.create(model="smollm2", prompt=prompt, max_tokens=2, temperature=0)
    again = client.completions.create(model="smollm2", prompt=prompt, max_tokens=2, temperature=0)
    assert first.usage is not None and again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and again.usage.prompt_tokens - 16 <= cached < again.usage.prompt_tokens
    assert again.choices[0].text == first.choices[0].text


def test_logprobs_of_both_forms_name_the_chosen_token(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="smollm2", prompt="The sky is", max_tokens=3, temperature=0, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == plain.choices[0].text
    assert logprobs.token_logprobs is not None
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value <= 0 and top[token] == value == max(top.values())
    chat = client.chat.completions.create(
        model="smollm2",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=3,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None and len(content.content) == 3
    assert all(len(entry.top_logprobs) == 2 and entry.bytes is not None for entry in content.content)


def test_stop_strings_and_several_choices(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smollm2", prompt="1, 2, 3, 4,", max_tokens=16, temperature=0)
    text = whole.choices[0].text
    stop = text[6:9]
    stopped = client.completions.create(model="smollm2", prompt="1, 2, 3, 4,", max_tokens=16, temperature=0, stop=stop)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    several = client.completions.create(model="smollm2", prompt="I like", max_tokens=8, n=3, seed=5, temperature=1.0)
    again = client.completions.create(model="smollm2", prompt="I like", max_tokens=8, n=3, seed=5, temperature=1.0)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len(set(texts)) > 1 and texts == [choice.text for choice in again.choices]


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="smollm2", prompt="hello " * 9000, max_tokens=10)
    assert refused.value.code == "context_length_exceeded"
    assert "8192" in refused.value.message and "9000" in refused.value.message.replace("9001", "9000")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="smollm2", prompt="x", temperature=3.5)
    assert wrong.value.param == "temperature"


def test_every_response_names_its_request_and_its_route(cluster: Cluster) -> None:
    body = {"model": "smollm2", "prompt": "x", "max_tokens": 2}
    answer = cluster.http.post(f"{cluster.url}/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert answer.headers["X-Bascule-Route"] == "remote;prefill=prefill-0;decode=decode-0"
    failed = cluster.http.post(f"{cluster.url}/v1/completions", content=b"{")
    assert failed.status_code == 400 and failed.headers["X-Request-Id"]


def test_a_request_beyond_its_own_time_limit_ends_with_an_error(cluster: Cluster) -> None:
    body = {"model": "smollm2", "prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    answer = cluster.http.post(f"{cluster.url}/v1/completions", json=body, headers={"X-Request-Timeout": "1"})
    assert answer.status_code == 504 and "X-Request-Timeout" in answer.json()["error"]["message"]


def test_metrics_and_probes_answer(cluster: Cluster) -> None:
    metrics = cluster.http.get(f"{cluster.url}/metrics").text
    for name in (
        'bascule_requests_total{outcome="',
        "bascule_time_to_first_token_seconds_count",
        "bascule_time_per_output_token_seconds_count",
        "bascule_inter_token_latency_seconds_count",
        'bascule_handoff_bytes_total{transport="shm"}',
        "bascule_kv_blocks{",
        "bascule_integrity_violations 0.0",
    ):
        assert name in metrics, name
    assert cluster.http.get(f"{cluster.url}/health").status_code == 200
    assert cluster.http.get(f"{cluster.url}/ready").status_code == 200
