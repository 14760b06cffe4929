"""Reading a model directory in Hugging Face format: its spec, tokenizer and chat template (not its weights)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bascule.errors import ModelError
from bascule.models.chat import ChatTemplate
from bascule.models.source import read_json
from bascule.models.spec import ModelSpec, spec_from_config
from bascule.models.tokenizer import TextTokenizer

_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ModelDirectory:
    """The small files of a model directory, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer_config = self._optional("tokenizer_config.json")

    def spec(self) -> ModelSpec:
        """The spec from config.json and generation_config.json."""
        config = read_json(self.path / "config.json")
        return spec_from_config(config, self._optional("generation_config.json"), str(self.path))

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of tokenizer.json, with the tokens that only tokenizer_config.json names.

        As in transformers 5, tokenizer.json alone says whether plain text gets a start token.
        """
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{self.path} has no tokenizer.json; make one with transformers:"
                " AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"cannot read {path}: {error}; fetch the model again") from error
        self._add_missing_tokens(tokenizer)
        return TextTokenizer(tokenizer)

    def chat_template(self) -> ChatTemplate | None:
        """The template of chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
        file = self.path / "chat_template.jinja"
        template: str | None
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        else:
            found = self._optional("chat_template.json") or self._tokenizer_config
            template = _default_template(found.get("chat_template"))
        return ChatTemplate(template, self._special_tokens()) if template else None

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path) if path.is_file() else {}

    def _special_tokens(self) -> dict[str, str]:
        named = {key: _content(self._tokenizer_config.get(key)) for key in _TEMPLATE_TOKENS}
        return {key: token for key, token in named.items() if token is not None}

    def _add_missing_tokens(self, tokenizer: Tokenizer) -> None:
        """Tokens that only tokenizer_config.json names; each must get the id it has there."""
        listed: Mapping[str, Mapping[str, Any]] = self._tokenizer_config.get("added_tokens_decoder", {})
        present = tokenizer.get_added_tokens_decoder()
        for index, token in sorted(listed.items(), key=lambda item: int(item[0])):
            if int(index) not in present:
                fields = {
                    key: bool(token.get(key)) for key in ("special", "normalized", "lstrip", "rstrip", "single_word")
                }
                tokenizer.add_tokens([AddedToken(token["content"], **fields)])
            known = tokenizer.token_to_id(token["content"])
            if known != int(index):
                raise ModelError(
                    f"{self.path}: the token {token['content']!r} is {index} in tokenizer_config.json and {known} in"
                    " tokenizer.json; fetch the model again"
                )


def _content(token: str | Mapping[str, Any] | None) -> str | None:
    """A token of tokenizer_config.json is a string or an object with `content`."""
    return token["content"] if isinstance(token, Mapping) else token


def _default_template(found: str | list[dict[str, str]] | None) -> str | None:
    """Some models list several named templates."""
    if not isinstance(found, list):
        return found
    by_name = {entry["name"]: entry["template"] for entry in found}
    return by_name.get("default")
