"""Who asks, in virtual time: the clients of `bench.load`, in a closed loop or with arrivals of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import count

from msgspec import Struct

from bascule.bench.load import RAMP_S, Record
from bascule.errors import Overloaded, RequestError
from bascule.router.flight import Flight
from bascule.sim.agenda import Agenda
from bascule.sim.router import SimRouter
from bascule.traffic.workloads import Talk
from bascule.types import Request, RequestId, SamplingParams


class ClientTimes(Struct, frozen=True, kw_only=True):
    """What lies between a client and the router, in seconds."""

    ask_s: float = 0.002
    """From a client's first byte until the router decides: HTTP, JSON, checks."""
    ask_token_s: float = 1e-6
    """More for each token of the prompt."""
    answer_s: float = 0.001
    """From a worker's step to the client's eyes."""
    timeout_s: float = 600.0
    """After which the router gives a request up."""


class _Turn:
    """A request under way, and what its client goes on with."""

    __slots__ = ("client", "start", "talk", "turn")

    def __init__(self, talk: Talk, turn: int, start: float, client: bool) -> None:
        self.talk = talk
        self.turn = turn
        self.start = start
        self.client = client
        """One of a closed loop, who takes the next talk afterwards."""


class Clients:
    """Offers talks one by one, so that a long trace is never all in memory."""

    def __init__(self, agenda: Agenda, router: SimRouter, times: ClientTimes) -> None:
        self.records: list[Record] = []
        self.open = 0
        """Talks that have begun and not ended."""
        self.begun = agenda.now()
        """What the times of talks and records count from."""
        self._agenda = agenda
        self._router = router
        self._times = times
        self._talks: Iterator[Talk] = iter(())
        self._more = True
        self._going: dict[RequestId, _Turn] = {}
        self._numbers = count()
        self._batch = f"{self.begun:g}"

    @property
    def done(self) -> bool:
        """All talks have ended."""
        return not self._more and not self.open

    def closed_loop(self, talks: Iterator[Talk], clients: int) -> None:
        """So many clients, who start within the same seconds as those of `bench.load.offer`."""
        self._talks = talks
        for number in range(clients):
            self.open += 1
            self._agenda.after(RAMP_S * number / clients, self._take)

    def open_loop(self, talks: Iterator[Talk]) -> None:
        """Each talk begins at its own time; they are in the order of these."""
        self._talks = talks
        self._arrive()

    def ended(self, flight: Flight, error: RequestError | None) -> None:
        """A request is over."""
        turn = self._going.pop(flight.request.id, None)
        if turn is None:
            return
        self.records.append(self._record(turn, flight, error))
        talk, following = turn.talk, turn.turn + 1
        if error is None and following < len(talk.asks):
            said = flight.request.prompt + tuple(flight.tokens) + talk.asks[following].prompt
            call = partial(self._ask, talk, following, said, turn.client)
            self._agenda.after(self._times.answer_s, call)
        elif turn.client:
            self._agenda.after(self._times.answer_s, self._take)
        else:
            self.open -= 1

    def _take(self) -> None:
        """A client of a closed loop takes the next talk, if there is one."""
        talk = next(self._talks, None)
        if talk is None:
            self._more = False
            self.open -= 1
            return
        self._ask(talk, 0, talk.asks[0].prompt, True)

    def _arrive(self) -> None:
        """The next talk is known; its time may be later."""
        talk = next(self._talks, None)
        if talk is None:
            self._more = False
        else:
            self._agenda.at(self.begun + (talk.at or 0.0), partial(self._come, talk))

    def _come(self, talk: Talk) -> None:
        self.open += 1
        self._ask(talk, 0, talk.asks[0].prompt, False)
        self._arrive()

    def _ask(self, talk: Talk, number: int, prompt: tuple[int, ...], client: bool) -> None:
        turn = _Turn(talk, number, self._agenda.now(), client)
        delay = self._times.ask_s + self._times.ask_token_s * len(prompt)
        self._agenda.after(delay, partial(self._admit, turn, prompt))

    def _admit(self, turn: _Turn, prompt: tuple[int, ...]) -> None:
        request = Request(
            id=RequestId(f"{self._batch}-{next(self._numbers)}"),
            prompt=prompt,
            sampling=SamplingParams(max_tokens=turn.talk.asks[turn.turn].output, temperature=0.0, ignore_eos=True),
            timeout=self._times.timeout_s,
        )
        self._going[request.id] = turn
        try:
            self._router.admit(request)
        except RequestError as error:
            if self._going.pop(request.id, None) is not None:
                self.records.append(Record(start=turn.start - self.begun, error=error.message, request=request.id))
                self.open -= 1

    def _record(self, turn: _Turn, flight: Flight, error: RequestError | None) -> Record:
        failed = "" if error is None else error.message
        rejected = isinstance(error, Overloaded)
        if not flight.tokens or not math.isfinite(flight.first_at):
            return Record(
                start=turn.start - self.begun, request=flight.request.id, error=failed or "no token", rejected=rejected
            )
        answer_s = self._times.answer_s
        return Record(
            start=turn.start - self.begun,
            ttft=flight.first_at + answer_s - turn.start,
            e2e=flight.latest_at + answer_s - turn.start,
            gaps=(flight.longest_gap_s,) if len(flight.tokens) > 1 else (),
            tokens=len(flight.tokens),
            asked=flight.request.sampling.max_tokens,
            prompt_tokens=len(flight.request.prompt),
            cached=flight.kv.cached_tokens or 0,
            request=flight.request.id,
            error=failed,
            rejected=rejected,
        )
