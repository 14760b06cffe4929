"""The decoder of the Llama family: packed tokens in, logits out, keys and values written into the arena's tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from bascule.engine.torch.attention import attend
from bascule.engine.torch.linear import Head, Linear
from bascule.engine.torch.plan import StepPlan, StepTensors, on_device
from bascule.engine.torch.rope import Rope, RopeTables, rotate
from bascule.models.spec import ModelSpec


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, in float32 whatever x is; `weight` is float32.

    Written with one reduction and updates in place because torch's own is eight times slower over bfloat16 rows on a
    CPU.
    """
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = x.float() * scale
    return normed.mul_(weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights; projections that read the same input are one matrix."""

    attention_norm: Tensor
    query_key_value: Linear
    head_norm: Tensor | None
    """[heads + kv_heads, head_dim]: the query heads' norm weight, then the key heads'."""
    attention_output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A model's weights and its forward pass. Holds no state of any sequence.

    In bfloat16 the matrix products, attention and KV are bfloat16. All that lies between them is float32, above all the
    sum that every layer adds to: rounded to bfloat16 after each of 60 additions it would lose what the products keep.
    """

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        """`weights` by Hugging Face name, all of one dtype and device; taken out of the dictionary as they are used."""
        self._spec = spec
        table = 0 if spec.tied_embeddings else weights["model.embed_tokens.weight"].nbytes
        self.weight_bytes = sum(weight.nbytes for weight in weights.values()) - table
        """What a step reads of the weights, in bytes: all but the embedding, unless that is the head too."""
        self._embedding = weights.pop("model.embed_tokens.weight")
        self._rope = Rope(spec, self._embedding.device)
        self._layers = [take_layer(spec, weights, index) for index in range(spec.layers)]
        self._norm = weights.pop("model.norm.weight").float()
        self._head = Head(self._embedding if spec.tied_embeddings else weights.pop("lm_head.weight"))

    def forward(self, plan: StepPlan, kv: Tensor) -> Tensor:
        """Compute one step; returns float32 logits [rows drawn, vocab].

        `kv` is [2 * layers, slots, kv_heads, head_dim]; the keys and values of the step's tokens are written into it.
        """
        step = on_device(plan, kv.dtype, kv.device)
        hidden = embedding(step.tokens, self._embedding).float()
        tables = self._rope.tables(step.positions)
        for index, layer in enumerate(self._layers):
            normed = rms_norm(hidden, layer.attention_norm, self._spec.norm_eps)
            hidden = hidden + self._attention(layer, normed, plan, step, tables, kv[2 * index : 2 * index + 2])
            normed = rms_norm(hidden, layer.mlp_norm, self._spec.norm_eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + layer.down(silu(gate.float()) * up)
        if not len(plan.drawn):
            return hidden.new_empty(0, self._spec.vocab)
        return self._head(rms_norm(hidden[step.drawn], self._norm, self._spec.norm_eps))

    def _attention(
        self, layer: Layer, x: Tensor, plan: StepPlan, step: StepTensors, tables: RopeTables, kv: Tensor
    ) -> Tensor:
        spec = self._spec
        projected = layer.query_key_value(x).view(len(x), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        turned = projected[:, : spec.heads + spec.kv_heads]
        if layer.head_norm is not None:
            turned = rms_norm(turned, layer.head_norm, spec.norm_eps)
        turned = rotate(turned, tables).to(kv.dtype)
        kv[0].index_copy_(0, step.slots, turned[:, spec.heads :])
        kv[1].index_copy_(0, step.slots, projected[:, spec.heads + spec.kv_heads :])
        return layer.attention_output(attend(turned[:, : spec.heads], kv, plan.sequences, step.masks))


def take_layer(spec: ModelSpec, weights: dict[str, Tensor], index: int) -> Layer:
    """Take one layer's weights out of `weights`, joining the matrices that share an input."""
    prefix = f"model.layers.{index}."

    def joined(names: tuple[str, ...], bias: bool) -> Linear:
        matrix = torch.cat([weights.pop(f"{prefix}{name}.weight") for name in names])
        return Linear(matrix, torch.cat([weights.pop(f"{prefix}{name}.bias") for name in names]) if bias else None)

    head_norm = None
    if spec.qk_norm:
        query_norm = weights.pop(f"{prefix}self_attn.q_norm.weight").float()
        key_norm = weights.pop(f"{prefix}self_attn.k_norm.weight").float()
        head_norm = torch.cat((query_norm.expand(spec.heads, -1), key_norm.expand(spec.kv_heads, -1)))
    return Layer(
        attention_norm=weights.pop(f"{prefix}input_layernorm.weight").float(),
        query_key_value=joined(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), spec.attention_bias),
        head_norm=head_norm,
        attention_output=joined(("self_attn.o_proj",), spec.output_bias),
        mlp_norm=weights.pop(f"{prefix}post_attention_layernorm.weight").float(),
        gate_up=joined(("mlp.gate_proj", "mlp.up_proj"), spec.mlp_bias),
        down=joined(("mlp.down_proj",), spec.mlp_bias),
    )
