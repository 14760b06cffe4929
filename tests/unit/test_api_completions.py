"""`/v1/completions`, by the unmodified `openai` client where it can say what is meant."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_rig import CONTEXT, KV_TOKENS, REMOTE, WAIT, ApiRig, says
from starlette.datastructures import Headers

from bascule.api.context import timeout_of
from bascule.errors import InvalidRequest
from bascule.types import Brought, Delta, FinishReason


@pytest.fixture(scope="module")
def shared() -> Iterator[ApiRig]:
    with ApiRig() as rig:
        yield rig


@pytest.fixture
def rig(shared: ApiRig) -> Iterator[ApiRig]:
    shared.backend.reset()
    yield shared
    shared.assert_nothing_runs()


def test_a_completion_has_text_usage_and_a_finish_reason(rig: ApiRig) -> None:
    answer = rig.client.completions.create(model="tiny", prompt="abc", max_tokens=5)
    choice = answer.choices[0]
    assert (choice.text, choice.index, choice.finish_reason) == ("abcab", 0, "length")
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.id.startswith("cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_usage_sums_what_was_brought_for_each_prompt_once(rig: ApiRig) -> None:
    brought = Brought({"disk": 2}, 0.25, {"disk": 640}, 1.5)
    rig.backend.script = lambda request: [
        Delta(tokens=(97,), finish=FinishReason.LENGTH, cached_tokens=2, brought=brought)
    ]
    details = rig.complete(prompt=["abc", "abd"], n=2).json()["usage"]["prompt_tokens_details"]
    assert details == {
        "cached_tokens": 4,
        "loaded_tokens": {"disk": 4},
        "loaded_bytes": {"disk": 1280},
        "load_s": 0.5,
        "spared_s": 3.0,
    }


def test_sixteen_tokens_are_generated_unless_asked_otherwise(rig: ApiRig) -> None:
    assert rig.complete().json()["usage"]["completion_tokens"] == 16


def test_the_default_is_less_where_there_is_less_room(rig: ApiRig) -> None:
    prompt = [65] * (KV_TOKENS - 2)
    assert rig.complete(prompt=prompt).json()["usage"]["completion_tokens"] == 2


def test_an_end_token_is_a_stop(rig: ApiRig) -> None:
    rig.backend.script = lambda request: says("bye")
    answer = rig.client.completions.create(model="tiny", prompt="abc")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("bye", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == 4


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_a_prompt_may_be_text_or_token_ids(rig: ApiRig, prompt: object) -> None:
    answer = rig.complete(prompt=prompt, max_tokens=4).json()
    assert [choice["text"] for choice in answer["choices"]] == ["abca"]
    assert rig.backend.requests[0].prompt == (97, 98, 99)


def test_several_prompts_times_n_are_numbered_prompt_by_prompt(rig: ApiRig) -> None:
    answer = rig.client.completions.create(model="tiny", prompt=["ab", "xyz"], n=2, max_tokens=3, seed=10)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "aba"),
        (1, "aba"),
        (2, "xyz"),
        (3, "xyz"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2 + 3, 4 * 3)
    seeds = {request.id: request.sampling.seed for request in rig.backend.requests}
    assert len(seeds) == 4
    assert sorted(seeds.values()) == [10, 10, 11, 11]


def test_echo_puts_the_prompt_before_the_text(rig: ApiRig) -> None:
    answer = rig.client.completions.create(model="tiny", prompt=["abc", "xy"], echo=True, max_tokens=2)
    assert [choice.text for choice in answer.choices] == ["abcab", "xyxy"]
    assert rig.complete(prompt=[97, 98], echo=True, max_tokens=1).json()["choices"][0]["text"] == "aba"


def test_logprobs_have_the_chosen_token_the_likeliest_and_offsets(rig: ApiRig) -> None:
    answer = rig.client.completions.create(model="tiny", prompt="abc", logprobs=2, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    assert logprobs.text_offset == [0, 1, 2]


def test_logprobs_can_name_tokens_by_their_ids(rig: ApiRig) -> None:
    answer = rig.complete(prompt="abc", logprobs=1, max_tokens=2, return_tokens_as_token_ids=True).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:97", "token_id:98"]
    assert logprobs["top_logprobs"] == [{"token_id:97": -0.5}, {"token_id:98": -0.5}]


def test_logprobs_zero_report_the_chosen_token_only(rig: ApiRig) -> None:
    logprobs = rig.complete(logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"a": -0.5}]


def test_part_of_a_character_is_named_by_its_bytes(rig: ApiRig) -> None:
    logprobs = rig.complete(prompt="é", logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_without_logprobs_there_are_none(rig: ApiRig) -> None:
    assert rig.complete().json()["choices"][0]["logprobs"] is None
    assert rig.backend.requests[0].sampling.logprobs is None


def test_a_stop_string_cuts_the_text_and_cancels_the_generation(rig: ApiRig) -> None:
    answer = rig.client.completions.create(model="tiny", prompt="hello world ", stop=["lo w", "zz"], max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hel", "stop")
    assert answer.usage is not None and answer.usage.completion_tokens == len("hello w")
    assert rig.backend.generations[0].ended.wait(WAIT)
    assert rig.backend.generations[0].cancelled


def test_return_token_ids_adds_them(rig: ApiRig) -> None:
    choice = rig.complete(return_token_ids=True, max_tokens=4).json()["choices"][0]
    assert choice["token_ids"] == [97, 98, 99, 97]
    assert "token_ids" not in rig.complete(max_tokens=4).json()["choices"][0]


def test_parameters_reach_the_backend(rig: ApiRig) -> None:
    rig.complete(
        max_tokens=9,
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        seed=-1,
        min_tokens=2,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        logit_bias={"7": -100, "8": 1.5},
        logprobs=3,
    )
    sampling = rig.backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.logprobs) == (9, 2, 3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1, 2)
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((5, 6), True)
    assert sampling.logit_bias == ((7, -100.0), (8, 1.5))
    assert sampling.seed == 2**64 - 1


def test_seeds_differ_where_none_is_given(rig: ApiRig) -> None:
    for _ in range(3):
        rig.complete(max_tokens=1)
    assert len({request.sampling.seed for request in rig.backend.requests}) == 3


def test_vllms_way_of_saying_no_top_k_is_understood(rig: ApiRig) -> None:
    rig.complete(top_k=-1, max_tokens=1)
    assert rig.backend.requests[0].sampling.top_k == 0


def test_a_minute_temperature_is_greedy(rig: ApiRig) -> None:
    rig.complete(temperature=1e-9, max_tokens=1)
    assert rig.backend.requests[0].sampling.temperature == 0


def test_unknown_fields_and_those_without_effect_are_accepted(rig: ApiRig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "bascule.api.endpoint")
    fields = {"user": "me", "metadata": {"a": "b"}, "store": True, "suffix": "", "best_of": 1, "colour": "red"}
    assert rig.complete(**fields).status_code == 200
    assert "not known here: colour" in caplog.text


def test_null_is_the_same_as_absent(rig: ApiRig) -> None:
    names = ("n", "max_tokens", "stop", "stream", "stream_options", "seed", "temperature", "logit_bias", "suffix")
    assert rig.complete(**dict.fromkeys(names)).status_code == 200


def test_the_route_names_mode_and_workers(rig: ApiRig) -> None:
    assert rig.complete().headers["X-Bascule-Route"] == "local;decode=mixed-0"
    rig.backend.placement = REMOTE
    assert rig.complete().headers["X-Bascule-Route"] == "remote;prefill=prefill-0;decode=decode-0"


def test_the_timeout_comes_from_the_header_or_the_configuration(rig: ApiRig) -> None:
    rig.complete(max_tokens=1)
    rig.post("/v1/completions", {"model": "tiny", "prompt": "a"}, headers={"X-Request-Timeout": "1.5"})
    assert [request.timeout for request in rig.backend.requests] == [60.0, 1.5]


def test_the_header_may_lengthen_the_time_up_to_an_hour_or_the_server_s_own_limit() -> None:
    headers = Headers({"X-Request-Timeout": "5000"})
    assert timeout_of(Headers({"X-Request-Timeout": "3600"}), 60.0) == 3600.0
    with pytest.raises(InvalidRequest, match="at most 3600 seconds"):
        timeout_of(headers, 60.0)
    assert timeout_of(headers, 5000.0) == 5000.0


def test_a_long_text_is_tokenised_too(rig: ApiRig) -> None:
    error = rig.complete(prompt="a" * 20_000).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "20000 of prompt" in error["message"]
    assert str(CONTEXT) in error["message"]


def test_a_delta_may_have_several_tokens(rig: ApiRig) -> None:
    rig.backend.script = lambda request: says("several", finish=FinishReason.LENGTH, size=3)
    answer = rig.complete().json()
    assert answer["choices"][0]["text"] == "several"
    assert answer["usage"]["completion_tokens"] == 7
