"""The flat buffers that hold an optimizer's state: how it is laid out, how large it is, how it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora import unified
from qlora.kernels.formats import (
    STATE_BLOCKSIZE,
    STATE_TILE,
    num_blocks,
    state_tiles,
    state_zero_code,
)
from qlora.paged_checks import Form, check_bits, form

BUCKET_BYTES = 256 * 2**20
"""State that one kernel updates, at most, unless one parameter has more. Two buckets are wanted on the GPU at a
time, and a prefetch is the longer under way the larger they are. Not measured."""


@dataclass(frozen=True)
class _Kind:
    """One of a parameter's states: a value for each `per` elements, fresh ones filled with `fill`."""

    dtype: torch.dtype
    per: int
    fill: int

    def view(self, flat: Tensor, start: int, param: Tensor) -> Tensor:
        """The part of a flat buffer that belongs to the parameter whose elements begin at `start`."""
        first, count = start // self.per, num_blocks(param.numel(), self.per)
        part = flat[first : first + count]
        return part.view(param.shape) if self.per == 1 else part


_KINDS = {
    32: {
        "exp_avg": _Kind(torch.float32, 1, 0),
        "exp_avg_sq": _Kind(torch.float32, 1, 0),
    },
    8: {
        "exp_avg": _Kind(torch.uint8, 1, state_zero_code(signed=True)),
        "exp_avg_sq": _Kind(torch.uint8, 1, state_zero_code(signed=False)),
        "exp_avg_absmax": _Kind(torch.float32, STATE_BLOCKSIZE, 0),
        "exp_avg_sq_absmax": _Kind(torch.float32, STATE_BLOCKSIZE, 0),
    },
}


def state_bytes(numels: Iterable[int], bits: int) -> int:
    """Bytes of the states of parameters of these sizes, with the padding between them.

    Args:
        numels: elements of each parameter.
        bits: 32 or 8.
    """
    check_bits(bits)
    elements = sum(map(state_tiles, numels)) * STATE_TILE
    return sum(elements // kind.per * kind.dtype.itemsize for kind in _KINDS[bits].values())


@dataclass(eq=False)
class Bucket:
    """Parameters of one dtype on one device that share buffers of state.

    Attributes:
        views: for each parameter, in the order in which they lie, its number of steps (fp32 [], on the CPU,
            as torch's) and its parts of the buffers, by name.
        buffers: flat, by name.
        paged: whether they are in unified memory.
        made_for: shape, dtype and device of each parameter when its state was made.
    """

    views: dict[Tensor, dict[str, Tensor]]
    buffers: dict[str, Tensor]
    paged: bool
    made_for: dict[Tensor, Form]
    _evicted: torch.cuda.Event | None = None

    @property
    def device(self) -> torch.device:
        return self.buffers["exp_avg"].device

    @property
    def is_rounded(self) -> bool:
        """Whether the parameters have fewer bits than the arithmetic."""
        return next(iter(self.views)).dtype != torch.float32

    def prefetch(self, stream: torch.cuda.Stream) -> None:
        """Bring the buffers onto the GPU, in the order of a stream, and after they were last moved out."""
        if self._evicted is not None:
            stream.wait_event(self._evicted)
        for buffer in self.buffers.values():
            unified.prefetch(buffer, self.device, stream)

    def evict(self, stream: torch.cuda.Stream) -> None:
        """Move the buffers to the host, in the order of a stream."""
        for buffer in self.buffers.values():
            unified.evict(buffer, stream)
        self._evicted = stream.record_event()


def parts(params: Sequence[Tensor], bits: int) -> Iterator[list[Tensor]]:
    """The parameters by device and dtype, in parts of at most BUCKET_BYTES of state or of one parameter."""
    alike: dict[Any, list[Tensor]] = {}
    for param in params:
        alike.setdefault((param.device, param.dtype), []).append(param)
    for group in alike.values():
        part, size = [], 0
        for param in group:
            more = state_bytes([param.numel()], bits)
            if part and size + more > BUCKET_BYTES:
                yield part
                part, size = [], 0
            part.append(param)
            size += more
        yield part


def new_bucket(params: list[Tensor], bits: int, paged: bool) -> Bucket:
    """Fresh state for parameters of one device and dtype."""
    device, kinds = params[0].device, _KINDS[bits]
    starts = [0]
    for param in params:
        starts.append(starts[-1] + state_tiles(param.numel()) * STATE_TILE)
    allocate = unified.empty if paged else torch.empty
    buffers = {
        name: allocate(starts[-1] // kind.per, dtype=kind.dtype, device=device)
        for name, kind in kinds.items()
    }
    views = {
        param: {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            **{name: kind.view(buffers[name], start, param) for name, kind in kinds.items()},
        }
        for param, start in zip(params, starts, strict=False)
    }
    bucket = Bucket(views, buffers, paged, {param: form(param) for param in params})
    if paged:
        bucket.prefetch(torch.cuda.current_stream(device))  # written there, not across the bus
    for name, buffer in buffers.items():
        buffer.fill_(kinds[name].fill)
    return bucket
