"""The outputs of one HTTP request under way: each is one request to the backend, read as pieces of text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from msgspec import Struct

from bascule.api.calls import together
from bascule.api.forms import Usage
from bascule.api.prompts import Call, Prompt
from bascule.api.text import OutputText, Piece
from bascule.api.tokens import Tokenizer
from bascule.errors import WorkerFailure
from bascule.observe.metrics import OutputTimer
from bascule.router.backend import Backend, Generation
from bascule.router.provenance import summed
from bascule.types import Brought, Delta, Placement, Request, RequestId, Slo, StoreHandoff


class Output:
    """One choice of the answer, from the backend's start to its last piece."""

    def __init__(self, index: int, request: Request, text: OutputText, timer: OutputTimer) -> None:
        self.index = index
        self._request = request
        self._text = text
        self._timer = timer
        self._generation: Generation | None = None
        self._deltas: AsyncIterator[Delta] | None = None
        self._cached_tokens = 0
        self._brought = Brought()
        self._handoff: StoreHandoff | None = None

    async def start(self, backend: Backend) -> Placement:
        """Returns where it was placed, once its first tokens are there; raises RequestError."""
        self._generation = await backend.start(self._request)
        self._deltas = aiter(self._generation)
        return self._generation.placement

    def cancel(self) -> None:
        """Stop it wherever it runs; does nothing once it has ended."""
        if self._generation is not None:
            self._generation.cancel()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self._request.prompt), self._text.tokens, self._cached_tokens, self._brought, self._handoff)

    async def next_piece(self) -> Piece:
        """The text that has come since, the last piece with `finish`; a stop string ends the backend's work too."""
        if self._deltas is None:
            raise RuntimeError("an output must be started before it is read")
        try:
            delta = await anext(self._deltas)
        except StopAsyncIteration:
            raise WorkerFailure("The output ended before it was finished. Send the request again.") from None
        self._timer.delivered()
        self._cached_tokens, self._brought, self._handoff = delta.cached_tokens, delta.brought, delta.handoff
        piece = self._text.push(delta)
        if piece.finish is not None:
            if self._generation is not None:
                self._generation.cancel(piece.finish)
            self._timer.ended(self._text.tokens)
        return piece

    async def all_pieces(self) -> list[Piece]:
        pieces = [await self.next_piece()]
        while pieces[-1].finish is None:
            pieces.append(await self.next_piece())
        return pieces


class Outputs:
    """All outputs of one HTTP request: `n` of each prompt, prompt by prompt, as OpenAI numbers them."""

    def __init__(self, items: Sequence[Output], n: int) -> None:
        self.items = items
        self._n = n

    async def start(self, backend: Backend) -> Placement:
        """Start all of them together; returns the first one's placement. The first failure ends them all."""
        placements = await together(output.start(backend) for output in self.items)
        return placements[0]

    def cancel(self) -> None:
        for output in self.items:
            output.cancel()

    @property
    def usage(self) -> Usage:
        """Tokens of the whole answer; a prompt counts once, however many outputs it has."""
        usages = [output.usage for output in self.items]
        if len(usages) == 1:
            return usages[0]
        prompts = usages[:: self._n]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            brought=sum((usage.brought for usage in prompts), Brought()),
            handoff=summed(usage.handoff for usage in usages if usage.handoff is not None),
        )


class Asked(Struct, frozen=True, kw_only=True):
    """What a call's headers say, which all its outputs share."""

    public_id: str
    backend_id: str
    """With it the outputs' request ids begin; never the same for two calls."""
    timeout: float
    """Seconds."""
    slo: Slo | None = None
    session: str = ""


def outputs_of(call: Call, asked: Asked, tokenizer: Tokenizer, timers: Sequence[OutputTimer]) -> Outputs:
    """The outputs that `call` asks for, not yet started."""
    n = call.parameters.n
    several = len(call.prompts) * n > 1
    items = []
    for position, prompt in enumerate(call.prompts):
        for choice in range(n):
            index = position * n + choice
            request = _request(call, asked, prompt, choice, index if several else None)
            text = OutputText(
                tokenizer,
                request.sampling,
                call.parameters.stop,
                include_stop=call.parameters.include_stop,
                echo=prompt.echo,
            )
            items.append(Output(index, request, text, timers[index]))
    return Outputs(items, n)


def _request(call: Call, asked: Asked, prompt: Prompt, choice: int, index: int | None) -> Request:
    """The request of one output; `index` is None where it is the only one."""
    base = asked.backend_id
    return Request(
        id=RequestId(base if index is None else f"{base}-{index}"),
        prompt=prompt.tokens,
        sampling=call.parameters.sampling_of(choice, prompt.max_tokens),
        timeout=asked.timeout,
        slo=asked.slo,
        session=asked.session,
        priority=call.parameters.priority,
        public_id=asked.public_id,
        output=index or 0,
        salt=call.parameters.salt,
    )
