"""The torch `Runner`: a model on a CPU or a CUDA device that computes steps over KV in an arena."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bascule.engine.protocol import Sampled, Slice
from bascule.engine.torch.cuda.copies import Copies, pin
from bascule.engine.torch.forms import Decoders, load_decoders
from bascule.engine.torch.penalties import Draw
from bascule.engine.torch.plan import plan_step
from bascule.engine.torch.sampling import sample
from bascule.engine.torch.weights import WeightForm
from bascule.errors import ConfigError
from bascule.kv.arena import Arena
from bascule.machine import give_back_memory
from bascule.models.card import card_of
from bascule.models.source import ModelSource
from bascule.models.spec import ModelSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchRunner:
    """Implements `engine.protocol.Runner`. `bind` must come before anything else."""

    def __init__(
        self,
        spec: ModelSpec,
        source: ModelSource,
        *,
        dtype: Literal["float32", "bfloat16"],
        device: str,
        threads: int,
        name: str,
        block_size: int,
        context: int | None = None,
        quantize: WeightForm = "auto",
        dense_twin: bool = True,
    ) -> None:
        """Load the model called `name`; takes seconds.

        `device` is `cpu`, `cuda` or `cuda:N`; `threads` is the number of CPU threads torch may use in this process;
        `context` bounds prompt plus output below the model's own limit; `quantize` and `dense_twin` are those of
        `forms.load_decoders`. Raises ModelError for files that cannot be read or do not fit the spec, ConfigError for a
        device, a context or a form of the weights that cannot be had.
        """
        self._dtype = _DTYPES[dtype]
        self._device = usable_device(device)
        torch.set_num_threads(threads)
        self.card = card_of(
            spec, source, dtype=dtype, quantize=quantize, name=name, block_size=block_size, context=context
        )
        self.stop_tokens = frozenset(spec.eos_token_ids)
        self._copies: Copies | None = None
        self._decoders: Decoders = load_decoders(
            spec, source, self._dtype, self._device, threads, quantize=quantize, dense_twin=dense_twin
        )
        give_back_memory()  # several times the weights were there for a moment

    def bind(self, arena: Arena) -> None:
        """Keep KV in `arena` from now on: on a CPU in its very bytes, on CUDA in a device tensor of the same shape.

        Raises ValueError if the arena's layout is not that of the card.
        """
        layout = self.card.layout
        if arena.layout != layout:
            raise ValueError(f"an arena of {arena.layout} for a model of {layout}")
        slots = arena.num_blocks * layout.block_size
        shape = (layout.planes, slots, layout.kv_heads, layout.head_dim)
        memory: Tensor = torch.from_numpy(arena.bytes).view(self._dtype).view(shape)
        self._kv, self._copies = memory, None
        if self._device.type == "cuda":
            self._kv = torch.zeros_like(memory, device=self._device)
            pin(memory, self._device)
            self._copies = Copies(memory, self._kv, layout.block_size)

    def weight_bytes(self, tokens: int) -> int:
        """Bytes of weights that a step of `tokens` tokens reads at the least."""
        return self._decoders.for_rows(tokens).weight_bytes

    @torch.inference_mode()
    def execute(self, batch: Sequence[Slice]) -> list[Sampled | None]:
        """Compute one step (see `Runner.execute`); raises ModelError if a logit is not finite."""
        plan = plan_step(batch, self.card.layout.block_size)
        logits = self._decoders.for_rows(len(plan.tokens)).forward(plan, self._kv)
        draws = [Draw(part.sampling, part.history, part.prompt_tokens) for part in batch if part.sampling is not None]
        drawn = iter(sample(logits, draws, self.stop_tokens) if draws else ())
        if not draws and self._device.type == "cuda":
            # Drawing waits for the device. Without it, the time of this step would be counted to the next one.
            torch.cuda.current_stream(self._device).synchronize()
        return [None if part.sampling is None else next(drawn) for part in batch]

    def publish(self, blocks: Sequence[int]) -> None:
        """Copy `blocks` from the device into the arena; nothing to do on a CPU."""
        if self._copies is not None:
            self._copies.out(blocks)

    def absorb(self, blocks: Sequence[int]) -> None:
        """Copy `blocks` from the arena to the device; nothing to do on a CPU."""
        if self._copies is not None:
            self._copies.back(blocks)


def usable_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` or `cuda:N`; raises ConfigError, with what to do, if it is not to be had here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} asked for, but torch finds {torch.cuda.device_count()} CUDA devices here; "
            + (
                "see whether nvidia-smi lists it and CUDA_VISIBLE_DEVICES lets it through"
                if torch.version.cuda
                else f"this torch ({torch.__version__}) is built for CPUs: install its build for CUDA"
            )
        )
    return device
