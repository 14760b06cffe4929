"""The parameters that completions and chat share: read from a body, checked, and turned into `SamplingParams`."""

from __future__ import annotations

import secrets

from msgspec import Struct
from msgspec.structs import replace

from bascule.api.fields import Fields, check_integer, check_number, check_text, wrong_type, wrong_value
from bascule.errors import InvalidRequest, NotFound
from bascule.kv.hashing import salt_of
from bascule.types import ModelCard, Salt, SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MAX_PRIORITY = 1_000_000

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy; dividing by it would overflow and change nothing."""

_SEED_MASK = (1 << 64) - 1

_WITHOUT_EFFECT = (
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "verbosity",
)
"""Fields of OpenAI's that are accepted and change nothing here."""


class Delivery(Struct, frozen=True, kw_only=True):
    """How the client wants the answer: at once or as a stream, and with what beside the text."""

    stream: bool = False
    include_usage: bool = False
    """The stream ends with a chunk that has the usage and no choice."""
    continuous_usage: bool = False
    """Every chunk has its choice's usage so far (an extension of vLLM's)."""
    token_ids: bool = False


class Parameters(Struct, frozen=True, kw_only=True):
    """What a client asked for, prompt aside."""

    n: int
    max_tokens: int | None
    """None where the client leaves it to the endpoint."""
    sampling: SamplingParams
    """As for choice 0, but for `max_tokens`, which depends on the prompt."""
    stop: tuple[str, ...]
    include_stop: bool
    """Keep the stop string that ended the text."""
    delivery: Delivery
    priority: int = 0
    """Of requests that wait, lower ones go first (vLLM's field)."""
    salt: Salt = b""
    """Of `cache_salt` (vLLM's field): KV is shared with requests that have the same."""

    def sampling_of(self, choice: int, max_tokens: int) -> SamplingParams:
        """Sampling of one choice: choice i draws with seed + i, so choices differ and each can be had again."""
        return replace(self.sampling, max_tokens=max_tokens, seed=(self.sampling.seed + choice) & _SEED_MASK)

    @property
    def chunk_per_delta(self) -> bool:
        """True if a chunk says more than its text, so that one is due even where no text is final yet."""
        return self.delivery.token_ids or self.delivery.continuous_usage or self.sampling.logprobs is not None


def check_model(fields: Fields, card: ModelCard) -> None:
    """Refuse a request for another model than the one served."""
    name = fields.text("model", None)
    if name is None:
        message = f"model is missing; this server has {card.name!r}."
        raise InvalidRequest(message, param="model", code="missing_required_parameter")
    if name != card.name:
        raise unknown_model(name, card)


def unknown_model(name: str, card: ModelCard) -> NotFound:
    message = f"The model {name!r} does not exist here; this server has {card.name!r}."
    return NotFound(message, param="model", code="model_not_found")


def read_parameters(fields: Fields, card: ModelCard, *, max_tokens: int | None, logprobs: int | None) -> Parameters:
    """Check the shared fields of a body.

    `max_tokens` and `logprobs` are what the endpoint made of the fields that completions and chat name differently.
    Raises InvalidRequest with `param` set to the first field at fault.
    """
    for name in _WITHOUT_EFFECT:
        fields.value(name)
    fields.text("user", None)
    fields.object("metadata")
    return Parameters(
        n=fields.integer("n", 1, 1, MAX_CHOICES),
        max_tokens=max_tokens,
        sampling=_sampling(fields, card, logprobs),
        stop=_stop_strings(fields),
        include_stop=fields.boolean("include_stop_str_in_output"),
        delivery=_delivery(fields),
        priority=fields.integer("priority", 0, -MAX_PRIORITY, MAX_PRIORITY),
        salt=_salt(fields),
    )


def _sampling(fields: Fields, card: ModelCard, logprobs: int | None) -> SamplingParams:
    temperature = fields.number("temperature", 1.0, 0, 2)
    top_k = fields.integer("top_k", 0, -1)
    seed = fields.integer("seed", None)
    return SamplingParams(
        max_tokens=card.context,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=fields.number("top_p", 1.0, 0, 1, above_low=True),
        top_k=0 if top_k == -1 else min(top_k, card.vocab),
        min_p=fields.number("min_p", 0.0, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        seed=secrets.randbits(64) if seed is None else seed & _SEED_MASK,
        min_tokens=fields.integer("min_tokens", 0, 0, card.context),
        stop_token_ids=_stop_token_ids(fields, card),
        ignore_eos=fields.boolean("ignore_eos"),
        logprobs=logprobs,
        logit_bias=_logit_bias(fields, card),
    )


def _delivery(fields: Fields) -> Delivery:
    stream = fields.boolean("stream")
    token_ids = fields.boolean("return_token_ids")
    options = fields.nested("stream_options")
    if options is None:
        return Delivery(stream=stream, token_ids=token_ids)
    if not stream:
        raise wrong_value("stream_options", "is allowed only with stream: true.")
    include_usage = options.boolean("include_usage")
    return Delivery(
        stream=True,
        include_usage=include_usage,
        continuous_usage=options.boolean("continuous_usage_stats") and include_usage,
        token_ids=token_ids,
    )


def _salt(fields: Fields) -> Salt:
    secret = fields.text("cache_salt", None)
    if secret == "":
        raise wrong_value("cache_salt", "is empty; leave it out to share cached prefixes with all who do so.")
    return salt_of(secret or "")


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value = fields.value("stop")
    if value is None:
        return ()
    if not isinstance(value, str | list):
        raise wrong_type("stop", "a string or a list of strings", value)
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MAX_STOPS:
        raise wrong_value("stop", f"has {len(stops)} strings; at most {MAX_STOPS} are allowed.")
    return tuple(_stop_string(f"stop[{index}]", stop) for index, stop in enumerate(stops))


def _stop_string(param: str, value: object) -> str:
    stop = check_text(param, value)
    if not 0 < len(stop) <= MAX_STOP_LENGTH:
        raise wrong_value(param, f"must have from 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}.")
    return stop


def _stop_token_ids(fields: Fields, card: ModelCard) -> tuple[int, ...]:
    values = fields.items("stop_token_ids") or []
    if len(values) > MAX_STOP_TOKENS:
        raise wrong_value("stop_token_ids", f"has {len(values)} ids; at most {MAX_STOP_TOKENS} are allowed.")
    return tuple(
        check_integer(f"stop_token_ids[{index}]", value, 0, card.vocab - 1) for index, value in enumerate(values)
    )


def _logit_bias(fields: Fields, card: ModelCard) -> tuple[tuple[int, float], ...]:
    entries = fields.object("logit_bias") or {}
    if len(entries) > MAX_LOGIT_BIAS:
        raise wrong_value("logit_bias", f"has {len(entries)} entries; at most {MAX_LOGIT_BIAS} are allowed.")
    return tuple(
        (_biased_token(key, card), check_number(f"logit_bias.{key}", bias, -100, 100)) for key, bias in entries.items()
    )


def _biased_token(key: str, card: ModelCard) -> int:
    token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
    if token is None or token >= card.vocab:
        raise wrong_value("logit_bias", f"has the key {key!r}; keys are token ids from 0 to {card.vocab - 1}.")
    return token
