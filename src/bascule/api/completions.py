"""`/v1/completions`: prompts as text or token ids, and OpenAI's older form of answers and log probabilities."""

from __future__ import annotations

from bascule.api.fields import Fields, wrong_type, wrong_value
from bascule.api.forms import json_logprob
from bascule.api.parameters import Parameters, check_model, read_parameters
from bascule.api.prompts import (
    MAX_TOKENS,
    TEXT_ONLY,
    Call,
    Prompt,
    Served,
    check_outputs,
    fitted,
    refuse_unsupported,
    tokenised,
)
from bascule.api.text import Piece, TokenReport
from bascule.api.tokens import Tokenizer
from bascule.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5


async def read_completion(fields: Fields, served: Served, tokenizer: Tokenizer) -> Call:
    """Check the body of a completion; raises InvalidRequest or NotFound."""
    check_model(fields, served.card)
    refuse_unsupported(fields, "suffix", "is not supported: this server does not insert text.", harmless=("",))
    refuse_unsupported(fields, "tools", "is not supported: this server does not call tools.", harmless=([],))
    refuse_unsupported(fields, "response_format", TEXT_ONLY, harmless=({"type": "text"},))
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    max_tokens = fields.integer("max_tokens", None, 1, MAX_TOKENS)
    parameters = read_parameters(fields, served.card, max_tokens=max_tokens, logprobs=logprobs)
    best_of = fields.integer("best_of", parameters.n, 1)
    if best_of != parameters.n:
        raise wrong_value("best_of", f"is {best_of}, but only best_of equal to n ({parameters.n}) is supported.")
    echo = fields.boolean("echo")
    if echo and logprobs is not None:
        raise wrong_value("echo", "together with logprobs is not supported; leave one of them out.")
    as_ids = fields.boolean("return_tokens_as_token_ids")
    given = _prompts(fields)
    check_outputs(len(given), parameters.n)
    characters = sum(len(value) for _, value in given if isinstance(value, str))
    prompts = [
        await _prompt(param, value, parameters, served, tokenizer, characters, echo=echo) for param, value in given
    ]
    return Call(prompts=tuple(prompts), parameters=parameters, form=CompletionForm(tokenizer, as_ids=as_ids))


def _prompts(fields: Fields) -> list[tuple[str, object]]:
    """The prompts of a body, each with its name for messages: a text or a list of token ids, not yet checked."""
    value = fields.value("prompt")
    if value is None:
        raise InvalidRequest("prompt is missing.", param="prompt", code="missing_required_parameter")
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return [(f"prompt[{index}]", item) for index, item in enumerate(value)]
    return [("prompt", value)]


async def _prompt(
    param: str,
    value: object,
    parameters: Parameters,
    served: Served,
    tokenizer: Tokenizer,
    characters: int,
    *,
    echo: bool,
) -> Prompt:
    """One prompt of a body whose texts have so many `characters` together."""
    if isinstance(value, str):
        if not value:
            raise _empty(param)
        tokens = await tokenised(tokenizer.encode, value, characters)
        return fitted(param, tokens, parameters, DEFAULT_MAX_TOKENS, served, echo=value if echo else "")
    if not isinstance(value, list):
        raise wrong_type(param, "a string, a list of token ids, or a list of either", value)
    ids = _token_ids(param, value, served.card.vocab)
    return fitted(param, ids, parameters, DEFAULT_MAX_TOKENS, served, echo=tokenizer.decode(ids) if echo else "")


def _token_ids(param: str, values: list[object], vocab: int) -> tuple[int, ...]:
    if not values:
        raise _empty(param)
    ids: list[int] = []
    for index, value in enumerate(values):
        if type(value) is not int:
            raise wrong_type(f"{param}[{index}]", "a token id", value)
        if not 0 <= value < vocab:
            message = f"is {str(value)[:40]}, which is no token id of this model; they go from 0 to {vocab - 1}."
            raise wrong_value(f"{param}[{index}]", message)
        ids.append(value)
    return tuple(ids)


def _empty(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is empty; send at least one token.", param=param, code="empty_prompt")


class CompletionForm:
    """A `text_completion`; its chunks have the same form as its answer."""

    id_prefix = "cmpl-"
    answer_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        """With `as_ids`, log probabilities name tokens by their ids, which unlike texts are never equal."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def opening(self) -> None:
        """Completions have no chunk before the first text."""

    def part(self, piece: Piece) -> dict[str, object]:
        return {"text": piece.text, "logprobs": self._logprobs(piece) if piece.reports else None}

    def whole(self, piece: Piece) -> dict[str, object]:
        return self.part(piece)

    def _logprobs(self, piece: Piece) -> dict[str, object]:
        """OpenAI's four lists; `text_offset` counts characters from the beginning of the choice's text."""
        return {
            "tokens": [self._name(report.token) for report in piece.reports],
            "token_logprobs": [json_logprob(report.logprobs.logprob) for report in piece.reports],
            "top_logprobs": [self._top(report) for report in piece.reports],
            "text_offset": [report.offset for report in piece.reports],
        }

    def _top(self, report: TokenReport) -> dict[str, float]:
        """The most likely tokens, best first, and the chosen one if it is not among them.

        Where two tokens have the same name, the likelier one keeps it.
        """
        named: dict[str, float] = {}
        for token, logprob in (*report.logprobs.top, (report.token, report.logprobs.logprob)):
            named.setdefault(self._name(token), json_logprob(logprob))
        return named

    def _name(self, token: int) -> str:
        """A token's text, or `bytes:\\xe2\\x80` for one that is part of a character (OpenAI's notation).

        By id it is `token_id:123` (vLLM's notation).
        """
        if self._as_ids:
            return f"token_id:{token}"
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
