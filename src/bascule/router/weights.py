"""Which weights the cluster serves, and when others may take their place."""

from __future__ import annotations

from dataclasses import dataclass

from bascule.errors import RegistrationRefused
from bascule.router.differences import differences
from bascule.types import ModelCard
from bascule.wire import Register


@dataclass(slots=True)
class Weights:
    """What the first worker of our own brought binds all later ones, but for a reload."""

    card: ModelCard | None = None
    reloading: bool = False
    """Workers with other weights may come, and take over once no worker with those of before takes requests."""

    @property
    def fingerprint(self) -> str:
        """Empty until the first worker of our own has joined."""
        return self.card.fingerprint if self.card is not None else ""

    def check(self, offer: Register, in_use: bool) -> None:
        """Raises RegistrationRefused, naming both sides of a mismatch; `in_use` says whether requests are placed on
        workers with the weights of before."""
        if self.card is not None and (in_use or not self.may_follow(offer.card)):
            _require_same_model(self.card, offer)

    def may_follow(self, card: ModelCard) -> bool:
        """Whether these weights are what a reload waits for: another version of the model, for the same prompts."""
        ours = self.card
        if ours is None or not self.reloading or card.fingerprint == ours.fingerprint:
            return False
        return _same_prompts(card, ours)


def _require_same_model(card: ModelCard, offer: Register) -> None:
    """Two cards must agree in everything that decides whether KV and tokens mean the same."""
    if not (found := differences(offer.card, card)):
        return
    what = ", ".join(f"{one.what} {one.here} instead of {one.there}" for one in found)
    mend = f"start all workers with the same {', '.join(dict.fromkeys(one.same for one in found))}"
    if _same_prompts(card, offer.card):
        mend += ", or let workers like this one take over with bascule admin reload"
    raise RegistrationRefused(
        f"worker {offer.worker} ({offer.card.name}) differs from this cluster's workers ({card.name}): {what}; {mend}"
    )


def _same_prompts(one: ModelCard, other: ModelCard) -> bool:
    return (one.name, one.vocab, one.context) == (other.name, other.vocab, other.context)
