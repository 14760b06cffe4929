"""A loaded model's tokenizer and chat template, as the api uses them."""

from __future__ import annotations

import pytest
from tiny_models import tokenizer_metadata

from bascule.api.text import OutputText
from bascule.api.tokens import Message, ModelTokenizer
from bascule.errors import InvalidRequest
from bascule.models.chat import ChatTemplate
from bascule.models.gguf_tokenizer import tokenizer_from_gguf
from bascule.models.tokenizer import TextTokenizer
from bascule.types import Delta, FinishReason, SamplingParams

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TEXT = "naïve 日本語 \U0001f600 text"


def tokenizer(template: str | None = TEMPLATE, *, add_bos: bool = False) -> ModelTokenizer:
    metadata = tokenizer_metadata(**{"tokenizer.ggml.add_bos_token": add_bos})
    compiled = None if template is None else ChatTemplate(template, {})
    return ModelTokenizer(tokenizer_from_gguf(metadata, "tiny"), compiled, "tiny", 64)


def test_text_survives_the_way_to_tokens_and_back() -> None:
    model = tokenizer()
    assert model.decode(model.encode(TEXT)) == TEXT


def test_no_request_waits_for_a_look_through_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer()
    monkeypatch.setattr(TextTokenizer, "_longest_token", lambda self: pytest.fail("the first request looks for it"))
    assert model.encode(TEXT)


def test_an_output_of_real_tokens_has_the_text_they_spell() -> None:
    model = tokenizer()
    tokens = model.encode(TEXT)
    output = OutputText(model, SamplingParams(max_tokens=100), (), include_stop=False)
    pieces = [
        output.push(Delta(tokens=(token,), finish=FinishReason.LENGTH if index == len(tokens) - 1 else None))
        for index, token in enumerate(tokens)
    ]
    assert "".join(piece.text for piece in pieces) == TEXT
    assert "".join(model.token_bytes(token).decode("latin-1") for token in tokens).encode("latin-1").decode() == TEXT


def test_a_chat_is_rendered_up_to_where_the_assistant_speaks_without_a_second_start_token() -> None:
    model = tokenizer(add_bos=True)
    tokens = model.encode_chat([Message("system", "be brief"), Message("user", "hi")])
    expected = "<|im_start|>system: be brief<|im_start|>user: hi<|im_start|>assistant: "
    assert [1, *tokens] == model.encode(expected)


def test_a_model_without_a_template_refuses_chat() -> None:
    with pytest.raises(InvalidRequest, match="tiny has no chat template"):
        tokenizer(None).encode_chat([Message("user", "hi")])


def test_a_text_that_is_far_too_long_is_refused_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokenizer()
    monkeypatch.setattr(TextTokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenised"))
    for encode in (lambda: model.encode(TEXT * 10_000), lambda: model.encode_chat([Message("user", TEXT * 10_000)])):
        with pytest.raises(InvalidRequest, match=r"context is 64 tokens.*at least") as refusal:
            encode()
        assert refusal.value.code == "context_length_exceeded"
