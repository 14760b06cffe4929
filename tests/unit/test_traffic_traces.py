"""Traces: three forms of file, what is wrong with one is told with its line, and what is made of them."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

import pytest

from bascule.errors import ConfigError
from bascule.traffic.arrivals import Arrivals
from bascule.traffic.prompts import prompt_of, trace_talks, vocabulary_of
from bascule.traffic.traces import TraceRequest, read_trace, repeated, scaled
from bascule.traffic.workloads import talks

MOONCAKE = (
    '{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 2]}\n'
    "\n"
    '{"timestamp": 1000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50,396,109\r\n"
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text, newline="")
    return path


def decision(arrived: float, prompt: int, blocks: list[str], output: int = 9) -> str:
    actual = {"output_tokens": output, "e2e_s": 1.5}
    fields = {"arrived": arrived, "prompt_tokens": prompt, "max_tokens": 20, "actual": actual}
    return json.dumps(fields | {"blocks": blocks, "session": "s", "outcome": "completed"}) + "\n"


def test_a_mooncake_trace_is_read_by_time_from_its_first_request_on(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, MOONCAKE))
    assert found == [TraceRequest(0.0, 1000, 7, (0, 1)), TraceRequest(2.0, 700, 5, (0, 2))]


def test_an_azure_trace_is_read_with_digits_beyond_microseconds(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(3.31941, abs=1e-5)


def test_a_decision_log_is_a_trace_whose_block_size_follows_from_its_lengths(tmp_path: Path) -> None:
    names = [f"{number:016x}" for number in range(6)]
    lines = decision(50.0, 97, names) + decision(51.0, 96, names[:5]) + decision(52.0, 40, names[:2], output=0)
    found = read_trace(written(tmp_path, lines))
    assert [(each.at, each.block_tokens, each.hash_ids, each.session, each.e2e_s) for each in found] == [
        (0.0, 16, (0, 1, 2, 3, 4, 5), "s", 1.5),
        (1.0, 16, (0, 1, 2, 3, 4), "s", 1.5),
    ]


def test_a_decision_log_without_named_blocks_is_a_trace_of_lengths(tmp_path: Path) -> None:
    found = read_trace(written(tmp_path, decision(50.0, 5000, []) + decision(51.0, 90, [])))
    assert [(each.prompt_tokens, each.hash_ids) for each in found] == [(5000, ()), (90, ())]


def test_a_decision_log_of_several_block_sizes_is_refused(tmp_path: Path) -> None:
    lines = decision(50.0, 97, ["0a"] * 6) + decision(51.0, 97, ["0a"] * 3)
    with pytest.raises(ConfigError, match="several block sizes"):
        read_trace(written(tmp_path, lines))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\n", "line 1: neither JSON lines nor a CSV header"),
        ("TIMESTAMP,ContextTokens\n", "missing: GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        (AZURE + "2023-11-16 18:15:50,396\r\n", "line 4: 2 columns"),
        (AZURE + "yesterday,396,4\r\n", "line 4: Invalid isoformat"),
        (AZURE + "2023-11-16 18:15:50,396,many\r\n", "line 4: invalid literal"),
        (AZURE + "2023-11-16 18:15:50,0,4\r\n", "line 4: 0 tokens in"),
        (MOONCAKE + '{"timestamp": 1', "line 4: "),
        (MOONCAKE + '{"timestamp": 1, "input_length": 7}', "line 4: .*output_length"),
        (MOONCAKE + '{"timestamp": 1, "input_length": -7, "output_length": 1}', "line 4: .*input_length"),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 7, "output_length": 1}', "line 4: "),
        (
            MOONCAKE + '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}',
            "line 4: 2 hash_ids",
        ),
    ],
)
def test_a_malformed_trace_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        read_trace(written(tmp_path, text))
    assert "trace" in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*nowhere"):
        read_trace(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        read_trace(tmp_path / "bytes")


def test_repetitions_follow_each_other_and_share_nothing_with_each_other(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE))
    found = repeated(trace, 3)
    assert [request.at for request in found] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert [request.hash_ids for request in found] == [(0, 1), (0, 2), (3, 4), (3, 5), (6, 7), (6, 8)]
    with pytest.raises(ConfigError, match="0 times"):
        repeated(trace, 0)


def test_a_scaled_trace_keeps_all_but_its_times(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, MOONCAKE))
    assert [request.at for request in scaled(trace, 4)] == [0.0, 0.5]
    for speed in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="speed"):
            scaled(trace, speed)


def test_equal_blocks_become_equal_tokens_of_any_vocabulary_and_different_ones_do_not() -> None:
    one, other = TraceRequest(0.0, 1200, 1, (7, 8)), TraceRequest(0.0, 700, 1, (7, 9))
    for vocabulary in (range(1000, 40_000), range(3, 300), range(5, 6)):
        first, second = prompt_of(one, 0, 1, vocabulary), prompt_of(other, 1, 1, vocabulary)
        assert (len(first), len(second)) == (1200, 700)
        assert first[:512] == second[:512]
        assert set(first + second) <= set(vocabulary)
    vocabulary = range(1000, 40_000)
    first, second = prompt_of(one, 0, 1), prompt_of(other, 1, 1)
    assert first[512:700] != second[512:]
    assert first[1024:] != prompt_of(one, 1, 1)[1024:]
    assert first[:512] != prompt_of(one, 0, 2)[:512]
    assert first[:4] == (3978, 31_605, 11_822, 14_335), "other tokens than a trace has always had"


def test_talks_of_a_trace_come_at_their_times() -> None:
    made = list(trace_talks([TraceRequest(0.5, 20, 3), TraceRequest(1.5, 30, 4)], 1))
    assert [(talk.at, len(talk.asks[0].prompt), talk.asks[0].output) for talk in made] == [(0.5, 20, 3), (1.5, 30, 4)]


def test_a_vocabulary_is_given_by_its_ends() -> None:
    assert vocabulary_of("5:9") == range(5, 9)
    for wrong in ("", "5", "9:5", "5:5", "a:b", "-1:4", f"0:{1 << 40}"):
        with pytest.raises(ConfigError, match="LOW:HIGH"):
            vocabulary_of(wrong)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(burstiness: float) -> None:
    times = list(islice(Arrivals(4.0, burstiness).times(Random(1)), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness, rel=0.1)


def test_requests_of_an_on_off_source_come_in_its_on_times_at_the_rate_over_both() -> None:
    times = list(islice(Arrivals(10.0, on_s=2.0, off_s=3.0).times(Random(1)), 5000))
    assert all(at % 5.0 < 2.0 + 1e-9 for at in times)
    assert len(times) / times[-1] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"burstiness": 0.0}, {"on_s": 0.0}, {"off_s": -1.0}])
def test_arrivals_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is not possible"):
        Arrivals(**{"rate": 1.0, **wrong})


def test_a_workload_is_the_same_for_the_same_seed_and_keeps_to_its_vocabulary() -> None:
    made = talks("mixed", 6, 1, 2.0)
    assert made == talks("mixed", 6, 1, 2.0)
    assert made != talks("mixed", 6, 2, 2.0)
    assert made[2].at == pytest.approx(4.382270054020589)
    small = talks("shared-prefix", 6, 1, vocabulary=range(3, 9))
    assert {token for talk in small for token in talk.asks[0].prompt} == set(range(3, 9))
    with pytest.raises(ConfigError, match="there are chat"):
        talks("chess", 1, 1)
