"""The weight of a case in every form that a contender holds it in, and the tensors that it is applied to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import clocks, peers
from benchmarks.harness import Case, Contender
from qlora.kernels import formats
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit

RANK, ALPHA = 64, 16.0
SCALING = ALPHA / RANK
OURS = "qlora"

_SETS_BYTES = 256 * 2**20
_MOST_SETS = {"cpu": 2, "cuda": 64}
"""Input sets of a case: at least two, and on a GPU as many as move this many bytes together, far more than a cache."""


@dataclass(frozen=True)
class Variant:
    """A weight's shape [n, k], and where and in what it is computed with."""

    device: torch.device
    dtype: torch.dtype
    n: int
    k: int
    quick: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def dense_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize

    @property
    def nf4_bytes(self) -> int:
        """Of the packed weight and its scales, doubly quantized."""
        blocks = formats.num_blocks(self.n * self.k, 64)
        nested = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
        return formats.packed_bytes(self.n * self.k) + blocks + 4 * nested + 4

    def case(
        self,
        group: str,
        contenders: Sequence[Contender],
        targets: Mapping[str, float],
        bytes_moved: int,
        words: Sequence[str] = (),
        m: int = 1,
        rank: int = 0,
        parameters: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Case:
        """A case of this weight; `words` and `parameters` tell it from others, `more` are fields of `Case`."""
        shape = {"n": self.n, "k": self.k, "m": m, "rank": rank, "dtype": self.dtype_name}
        return Case(
            group=group,
            name=", ".join([f"{self.n} x {self.k}", self.dtype_name, *words]),
            parameters={**shape, **(parameters or {})},
            inputs=partial(Inputs, self.device, self.dtype, self.n, self.k, m),
            contenders=contenders,
            # A few rounds over a tiny shape say nothing about what is aimed at.
            targets={} if self.quick else targets,
            input_sets=2 if self.quick else self._input_sets(bytes_moved),
            device=self.device,
            bytes_moved=bytes_moved,
            **more,
        )

    def _input_sets(self, bytes_moved: int) -> int:
        return max(2, min(_MOST_SETS[self.device.type], -(-_SETS_BYTES // bytes_moved)))

    def replayed(self) -> str:
        """The clock of short calls: without Python between the launches, where that can be had."""
        return clocks.GRAPH if self.device.type == "cuda" else clocks.EAGER


class Inputs:
    """Random tensors of a case, and what follows from them, each made when it is first asked for."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, n: int, k: int, m: int, seed: int
    ) -> None:
        self.dtype, self.n, self.k = dtype, n, k
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        self.original = normal(n, k).div_(k**0.5).to(dtype)
        self.x, self.grad_y = normal(m, k).to(dtype), normal(m, n).to(dtype)
        self.lora_a, self.lora_b = normal(RANK, k) / k**0.5, normal(n, RANK) / RANK**0.5

    @cached_property
    def quantized(self) -> QuantizedTensor:
        return quantize_4bit(self.original)

    @cached_property
    def dense(self) -> Tensor:
        """The decoded weight."""
        return dequantize_4bit(self.quantized)

    @cached_property
    def linear(self) -> nn.Linear:
        """A dense layer with the decoded weight."""
        linear = nn.Linear(self.k, self.n, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dense, requires_grad=False)
        return linear

    @cached_property
    def torchao(self) -> Tensor:
        """The weight in torchao's NF4, which has its own packing and scales and so decodes to another."""
        return peers.torchao_quantize(self.original)
