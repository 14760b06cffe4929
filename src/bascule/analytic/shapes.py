"""What a model weighs: parameters, arithmetic and KV of a decoder, dense or of experts, counted from its shape."""

from __future__ import annotations

from msgspec import Struct

from bascule.models.spec import ModelSpec


class ModelShape(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The numbers of a decoder that decide what a step reads and computes; zero for what it does not have."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    """One for latent attention: all tensor-parallel ranks keep the same KV."""
    head_dim: int
    """Of queries and keys."""
    intermediate: int
    """Of the dense feed-forward layers."""
    vocab: int
    value_dim: int = 0
    """Of values, where it is not `head_dim`."""
    dense_layers: int | None = None
    """Layers without experts; None: all."""
    experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    expert_intermediate: int = 0
    query_rank: int = 0
    latent: int = 0
    """Rank of latent attention: numbers that it keeps for a token and layer instead of keys and values of heads."""
    rope_dim: int = 0
    """Numbers kept besides the latent ones, for the rotary part of a key."""
    window_layers: int = 0
    window: int = 0
    """Tokens that the `window_layers` attend to."""
    attended: int = 0
    """Most tokens that sparse attention attends to; zero for all."""
    recurrent_layers: int = 0
    recurrent_heads: int = 0
    recurrent_head_dim: int = 0
    """Layers that keep a state of `heads * head_dim^2` numbers for a sequence instead of KV."""

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> ModelShape:
        """The shape of a model whose files are here."""
        return cls(
            hidden=spec.hidden,
            layers=spec.layers,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate=spec.intermediate,
            vocab=spec.vocab,
        )

    @property
    def attention_layers(self) -> int:
        """Layers that keep KV."""
        return self.layers - self.recurrent_layers

    @property
    def expert_layers(self) -> int:
        return 0 if self.dense_layers is None else self.layers - self.dense_layers

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def attention_parameters(self) -> float:
        """Of the projections of all attention and recurrent layers."""
        inner = self.heads * self.head_dim
        if self.latent:
            each = self.query_rank * (self.hidden + inner) + self.hidden * (self.latent + self.rope_dim)
            each += self.latent * self.heads * (self.head_dim - self.rope_dim + self.values)
            each += self.heads * self.values * self.hidden
        else:
            gate = inner if self.recurrent_layers else 0
            each = self.hidden * (2 * inner + gate + 2 * self.kv_heads * self.head_dim)
        recurrent = self.recurrent_heads * self.recurrent_head_dim
        return float(self.attention_layers * each + self.recurrent_layers * self.hidden * 3.5 * recurrent)

    @property
    def dense_parameters(self) -> float:
        """Of the feed-forward layers that every token passes: the dense ones, and shared experts."""
        dense = self.layers - self.expert_layers
        return (
            3.0
            * self.hidden
            * (dense * self.intermediate + self.expert_layers * self.shared_experts * self.expert_intermediate)
        )

    @property
    def head_parameters(self) -> float:
        return float(self.hidden * self.vocab)

    @property
    def expert_parameters(self) -> float:
        """Of all routed experts together."""
        return 3.0 * self.hidden * self.expert_intermediate * self.experts * self.expert_layers

    @property
    def routed_share(self) -> float:
        """The part of the routed experts that one token passes."""
        return self.experts_per_token / self.experts if self.experts else 0.0

    @property
    def parameters(self) -> float:
        """All, the embedding counted apart from the head."""
        return self.attention_parameters + self.dense_parameters + self.expert_parameters + 2 * self.head_parameters

    @property
    def kv_numbers(self) -> float:
        """Numbers of KV of one token in one layer that keeps KV."""
        return float(self.latent + self.rope_dim or self.kv_heads * (self.head_dim + self.values))

    @property
    def state_numbers(self) -> float:
        """Numbers of recurrent state of one sequence, all layers."""
        return float(self.recurrent_layers * self.recurrent_heads * self.recurrent_head_dim**2)

    @property
    def pair_flops(self) -> float:
        """Operations of one attention layer for one pair of (new token, token it attends to)."""
        return 2.0 * self.heads * (self.head_dim + self.values)
