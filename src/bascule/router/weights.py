"""Which weights the cluster serves, and when others may take their place."""

from __future__ import annotations

from dataclasses import dataclass

from bascule.errors import RegistrationRefused
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
        return (card.name, card.vocab, card.context) == (ours.name, ours.vocab, ours.context)


def _require_same_model(card: ModelCard, offer: Register) -> None:
    """Two cards must agree in everything that decides whether KV and tokens mean the same."""
    for what, ours, theirs in (
        ("model fingerprint", card.fingerprint, offer.card.fingerprint),
        ("KV layout", card.layout, offer.card.layout),
        ("vocabulary", card.vocab, offer.card.vocab),
        ("context length", card.context, offer.card.context),
    ):
        if ours != theirs:
            raise RegistrationRefused(
                f"worker {offer.worker} serves {offer.card.name} with {what} {theirs}, but this cluster serves "
                f"{card.name} with {what} {ours}; start all workers with the same model, dtype, block size and codecs, "
                "or let other weights take over with bascule admin reload"
            )
