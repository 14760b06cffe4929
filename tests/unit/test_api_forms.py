"""Chunks from a prepared frame say what the same chunk, encoded as a whole, would say."""

from __future__ import annotations

import json

import pytest
from api_rig import ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from bascule.api.chat import ChatForm
from bascule.api.completions import CompletionForm
from bascule.api.forms import Form, Usage, Writer
from bascule.api.text import Piece, TokenReport
from bascule.types import Brought, FinishReason, StoreHandoff, TokenLogprobs

FORMS: list[Form] = [CompletionForm(ByteTokenizer()), ChatForm(ByteTokenizer())]


def whole(form: Form, index: int, piece: Piece, usage: Usage | None, *, token_ids: bool, has_usage: bool) -> object:
    """A chunk as one dictionary."""
    choice = {"index": index, **form.part(piece), "finish_reason": piece.finish}
    if token_ids:
        choice["token_ids"] = list(piece.tokens)
    chunk = {"id": f"{form.id_prefix}r", "created": 5, "model": 'a "model"', "object": form.chunk_object}
    chunk["choices"] = [choice]
    if has_usage:
        chunk["usage"] = None if usage is None else usage.fields()
    return chunk


def parsed(event: bytes) -> object:
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    return json.loads(event.removeprefix(b"data: "))


@pytest.mark.parametrize("form", FORMS, ids=["completion", "chat"])
@given(texts=st.lists(st.tuples(st.integers(0, 3), st.text())), token_ids=st.booleans(), has_usage=st.booleans())
def test_a_plain_chunk_is_the_whole_chunk_field_by_field(
    form: Form, texts: list[tuple[int, str]], token_ids: bool, has_usage: bool
) -> None:
    writer = Writer(form, "r", 5, 'a "model"', token_ids=token_ids, usage=has_usage)
    for index, text in [(0, '\0 "quoted" \u2028 \\'), *texts]:
        piece = Piece(text=text, tokens=(1, 2))
        got = writer.chunk(index, piece, None)
        assert b"\n" not in got[:-2]
        expected = whole(form, index, piece, None, token_ids=token_ids, has_usage=has_usage)
        assert parsed(got) == expected
        assert list(json.loads(got[6:])["choices"][0]) == list(expected["choices"][0])  # type: ignore[index]


@pytest.mark.parametrize("form", FORMS, ids=["completion", "chat"])
@pytest.mark.parametrize(
    ("piece", "usage"),
    [
        (Piece(text="x", tokens=(1,), finish=FinishReason.LENGTH), None),
        (Piece(text="x", tokens=(1,)), Usage(1, 2, 0)),
        (Piece(text="x", tokens=(1,), reports=(TokenReport(1, 0, TokenLogprobs(-0.5, ((1, -0.5),))),)), None),
    ],
    ids=["last", "usage", "logprobs"],
)
def test_a_chunk_that_says_more_than_its_text_does_so_after_plain_ones_too(
    form: Form, piece: Piece, usage: Usage | None
) -> None:
    writer = Writer(form, "r", 5, 'a "model"', token_ids=False, usage=True)
    writer.chunk(0, Piece(text="plain", tokens=(7,)), None)
    assert parsed(writer.chunk(0, piece, usage)) == whole(form, 0, piece, usage, token_ids=False, has_usage=True)


def test_usage_says_what_kv_was_brought_and_nothing_of_what_was_not() -> None:
    assert Usage(5, 2, 3).fields()["prompt_tokens_details"] == {"cached_tokens": 3}
    brought = Brought({"disk": 2, "peer": 1}, 0.25, {"disk": 640, "peer": 320}, 1.5)
    assert Usage(5, 2, 3, brought).fields()["prompt_tokens_details"] == {
        "cached_tokens": 3,
        "loaded_tokens": {"disk": 2, "peer": 1},
        "loaded_bytes": {"disk": 640, "peer": 320},
        "load_s": 0.25,
        "spared_s": 1.5,
    }
    assert Usage(5, 2, 0, Brought(seconds=0.5)).fields()["prompt_tokens_details"] == {"cached_tokens": 0, "load_s": 0.5}
    handoff = StoreHandoff({"disk": 900}, {"disk": 4}, {"disk": 640}, 0.125, 1)
    assert Usage(5, 2, 0, handoff=handoff).fields()["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "handoff": {
            "saved_bytes": {"disk": 900},
            "loaded_tokens": {"disk": 4},
            "loaded_bytes": {"disk": 640},
            "load_s": 0.125,
            "computed_tokens": 1,
        },
    }
