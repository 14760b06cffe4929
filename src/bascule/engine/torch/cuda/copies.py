"""KV between a device and the arena: copies of whole runs on a stream of their own, from and to pinned memory."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bascule.kv.arena import runs

_PORTABLE = 1
"""Flag of cudaHostRegister: pinned for every device."""

logger = logging.getLogger(__name__)


def pin(memory: Tensor, device: torch.device) -> bool:
    """Register `memory` of the host with CUDA until the tensor is gone; False, and a log line, if that is refused.

    Copies work either way. Pinned they are faster and the host need not wait for them, and all of the memory is in use
    from the start.
    """
    address = memory.data_ptr()
    try:
        with torch.cuda.device(device):
            status = int(_cudart().cudaHostRegister(address, memory.nbytes, _PORTABLE))
            refusal = f"CUDA error {status}" if status else ""
            if refusal:
                _forget_error(device)
    except RuntimeError as error:
        refusal = str(error)
    if refusal:
        logger.warning("%d bytes of KV memory cannot be pinned (%s); copies are slower", memory.nbytes, refusal)
        return False
    weakref.finalize(memory, lambda: _cudart().cudaHostUnregister(address))
    return True


def pieces(source: Tensor, target: Tensor, blocks: Sequence[int], block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What to copy for `blocks` of [planes, slots, ...]: for each run of blocks and plane, what lies in one piece.

    Over all planes at once a copy would not be in one piece, and torch would gather it in other memory first.
    """
    for run in runs(blocks):
        slots = slice(run.start * block_size, (run.start + run.count) * block_size)
        yield from zip(source[:, slots].unbind(), target[:, slots].unbind(), strict=True)


class Copies:
    """Moves blocks between the arena and the device's KV memory."""

    def __init__(self, arena: Tensor, kv: Tensor, block_size: int) -> None:
        """`arena` on the host and `kv` on a CUDA device are [planes, slots, kv_heads, head_dim]."""
        self._arena, self._kv, self._block_size = arena, kv, block_size
        self._stream = torch.cuda.Stream(kv.device)  # type: ignore[no-untyped-call]

    def out(self, blocks: Sequence[int]) -> None:
        """To the arena, which others may read when this returns."""
        self._copy(self._kv, self._arena, blocks).synchronize()

    def back(self, blocks: Sequence[int]) -> None:
        """To the device: whatever is launched there from now on finds it."""
        self._copy(self._arena, self._kv, blocks).wait(torch.cuda.current_stream(self._kv.device))

    def _copy(self, source: Tensor, target: Tensor, blocks: Sequence[int]) -> torch.cuda.Event:
        """Copy once the device has done what was launched before; the event says when it is through."""
        with torch.cuda.device(self._kv.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for there, here in pieces(source, target, blocks, self._block_size):
                    here.copy_(there, non_blocking=True)
            done: torch.cuda.Event = self._stream.record_event()
            return done


def _cudart() -> Any:
    """CUDA's runtime API, as far as torch has it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the last error until somebody asks, and the next launch would fail with it."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        logger.debug("the refusal was still there", exc_info=True)
