"""Whether a prompt and its output fit the model's context and some worker's KV memory."""

from __future__ import annotations

from bascule.api.fields import wrong_value
from bascule.errors import InvalidRequest
from bascule.types import ModelCard


def output_limit(
    param: str, prompt_tokens: int, max_tokens: int | None, default: int | None, card: ModelCard, kv_tokens: int
) -> int:
    """The most tokens that may be generated after a prompt of `prompt_tokens`, which came in the field `param`.

    That is `max_tokens`, or else `default` as far as there is room, or else all the room there is. Raises
    InvalidRequest (`context_length_exceeded`, `kv_memory_exceeded`) where prompt and output cannot fit.
    """
    if prompt_tokens == 0:
        raise InvalidRequest(f"{param} is empty; send at least one token.", param=param, code="empty_prompt")
    wanted = 1 if max_tokens is None else max_tokens
    total = prompt_tokens + wanted
    parts = f"{total}: {prompt_tokens} of prompt and {wanted} of output"
    if total > card.context:
        raise InvalidRequest(
            f"This model's context is {card.context} tokens, but the request needs {parts}. "
            "Shorten the prompt or lower max_tokens.",
            param=param if prompt_tokens >= card.context else "max_tokens",
            code="context_length_exceeded",
        )
    if total > kv_tokens:
        raise InvalidRequest(
            f"A worker's KV memory holds {kv_tokens} tokens, but the request needs {parts}. "
            "Shorten it, or start the server with more --kv-memory.",
            param=param if prompt_tokens >= kv_tokens else "max_tokens",
            code="kv_memory_exceeded",
        )
    room = min(card.context, kv_tokens) - prompt_tokens
    if max_tokens is not None:
        return max_tokens
    return room if default is None else min(default, room)


def check_min_tokens(min_tokens: int, max_tokens: int) -> None:
    """Refuse a lower bound on the output that is above the upper one."""
    if min_tokens > max_tokens:
        raise wrong_value("min_tokens", f"is {min_tokens}, more than the {max_tokens} tokens that may be generated.")
