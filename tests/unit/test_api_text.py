"""Text from deltas: stop strings, offsets and characters that come in pieces."""

from __future__ import annotations

import pytest
from api_rig import END, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from bascule.api.stops import StopScanner
from bascule.api.text import OutputText, Piece
from bascule.types import Delta, FinishReason, SamplingParams, TokenLogprobs

SAMPLING = SamplingParams(max_tokens=1000)


def output(*stops: str, include_stop: bool = False, sampling: SamplingParams = SAMPLING, echo: str = "") -> OutputText:
    return OutputText(ByteTokenizer(), sampling, stops, include_stop=include_stop, echo=echo)


def feed(text: OutputText, raw: bytes, finish: FinishReason = FinishReason.LENGTH) -> list[Piece]:
    """One delta a byte, until the text is finished."""
    pieces: list[Piece] = []
    for index, token in enumerate(raw):
        pieces.append(text.push(Delta(tokens=(token,), finish=finish if index + 1 == len(raw) else None)))
        if pieces[-1].finish is not None:
            return pieces
    return pieces


def shown(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_text_that_may_begin_a_stop_string_is_held_back_and_released() -> None:
    scanner = StopScanner(("END",), include_stop=False)
    assert scanner.push("the E").text == "the "
    assert scanner.push("N").text == ""
    assert scanner.push("T").text == "ENT"
    assert scanner.flush() == ""


def test_a_stop_string_is_found_across_deltas_and_cut() -> None:
    text = output("END")
    pieces = feed(text, b"so ENDless")
    assert shown(pieces) == "so "
    assert pieces[-1].finish is FinishReason.STOP
    assert text.tokens == len("so END")


def test_a_stop_string_is_kept_if_asked_for() -> None:
    assert shown(feed(output("END", include_stop=True), b"so ENDless")) == "so END"


def test_tokens_after_the_stop_in_the_same_delta_count_for_nothing() -> None:
    text = output("b")
    piece = text.push(Delta(tokens=tuple(b"abcd"), finish=FinishReason.LENGTH))
    assert (piece.text, piece.tokens, piece.finish) == ("a", tuple(b"ab"), FinishReason.STOP)
    assert text.tokens == 2


def test_the_earliest_of_several_stop_strings_counts() -> None:
    text = output("cd", "bcd")
    piece = text.push(Delta(tokens=tuple(b"abcd")))
    assert piece.text == "a"


def test_a_begun_stop_string_is_text_where_the_output_ends() -> None:
    assert shown(feed(output("END"), b"the EN")) == "the EN"


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    text = output("b", sampling=SamplingParams(max_tokens=100, min_tokens=4))
    assert shown(feed(text, b"abababab")) == "aba"
    assert text.tokens == 4


def test_a_character_is_shown_once_it_is_whole() -> None:
    pieces = feed(output(), "é!".encode())
    assert [piece.text for piece in pieces] == ["", "é", "!"]


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character() -> None:
    assert shown(feed(output(), "é".encode()[:1])) == "�"


@pytest.mark.parametrize(("include_stop", "expected"), [(False, "a"), (True, "ab")])
def test_a_stop_token_has_no_text_unless_asked_for(include_stop: bool, expected: str) -> None:
    sampling = SamplingParams(max_tokens=9, stop_token_ids=(ord("b"),))
    text = output(include_stop=include_stop, sampling=sampling)
    pieces = feed(text, b"ab", FinishReason.STOP)
    assert shown(pieces) == expected
    assert text.tokens == 2


def test_an_end_token_counts_and_has_no_text() -> None:
    text = output()
    piece = text.push(Delta(tokens=(ord("a"), END), finish=FinishReason.STOP))
    assert (piece.text, piece.tokens, text.tokens) == ("a", (ord("a"), END), 2)


def test_the_echo_comes_first_and_counts_in_offsets() -> None:
    text = output(echo="prompt ")
    logprobs = (TokenLogprobs(-1.0), TokenLogprobs(-2.0))
    piece = text.push(Delta(tokens=tuple(b"ab"), logprobs=logprobs))
    assert piece.text == "prompt ab"
    assert [report.offset for report in piece.reports] == [7, 8]
    assert text.push(Delta(tokens=tuple(b"c"))).text == "c"


def test_offsets_count_characters_not_bytes() -> None:
    text = output()
    tokens = tuple("éa".encode())
    piece = text.push(Delta(tokens=tokens, logprobs=(TokenLogprobs(0.0),) * 3))
    assert [report.offset for report in piece.reports] == [0, 0, 1]


@given(
    text=st.text("abX", max_size=40),
    stops=st.lists(st.text("abX", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 7), max_size=40),
)
def test_pieces_show_what_the_whole_text_would_show(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against a scan that sees one character more at a time and all the text before it."""
    scanner = StopScanner(tuple(stops), include_stop=False)
    released, rest, stopped = "", text, False
    for cut in [*cuts, len(text)]:
        piece, rest = rest[:cut], rest[cut:]
        scan = scanner.push(piece)
        released += scan.text
        if stopped := scan.stopped:
            break
        assert not any(stop in released for stop in stops)
    found = [text.find(stop) for stop in stops if stop in text]
    if stopped:
        assert text.startswith(released)
        assert any(text.startswith(stop, len(released)) for stop in stops)
    else:
        assert not found
        assert released + scanner.flush() == text


@given(text=st.text("abX", max_size=30), stop=st.text("abX", min_size=1, max_size=5))
def test_one_stop_string_cuts_at_its_first_occurrence(text: str, stop: str) -> None:
    pieces = feed(output(stop), text.encode())
    assert shown(pieces) == text.partition(stop)[0]
