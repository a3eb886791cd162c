"""The specification of the optimizer: AdamW in plain PyTorch, its state in 32 or in 8 bits, on any device.

AdamW is algorithm 2 of Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; state in 8 bits is
section 2 of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". Every operation is one fp32
operation of its own, rounded to nearest, so that a result has the same bits on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.kernels.formats import (
    STATE_BLOCKSIZE,
    STATE_TILE,
    num_blocks,
    state_codebook,
    state_thresholds,
    state_tiles,
)
from qlora.kernels.reference import UINT32, hash_u32, normalize, to_blocks

SCALARS = ("decay", "weight1", "beta2", "weight2", "step_size", "root2", "eps")
"""Columns of `scalars`, see `adamw_scalars`."""


def adamw_scalars(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> list[float]:
    """What a step needs of the hyperparameters and of its number, which counts from 1: a row of `scalars`.

    Computed in fp64; to be rounded to fp32 once.
    """
    return [
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        eps,
    ]


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    scalars: Tensor,
    rng: Tensor | None,
) -> None:
    """One step for each parameter that has a gradient: parameters and states are updated in place.

    Args:
        params: n tensors of one dtype, fp32 / bf16 / fp16, any shapes.
        grads: of the parameters' shapes and dtype; None leaves a parameter and its state alone.
        exp_avg, exp_avg_sq: flat [tiles * STATE_TILE], fp32 or uint8 codes. The state of a parameter takes
            `state_tiles(numel)` tiles, where those of the one before it end; what is left of its last tile
            is neither read nor written.
        exp_avg_absmax, exp_avg_sq_absmax: fp32 [tiles * STATE_TILE / STATE_BLOCKSIZE] for codes, else None.
        scalars: fp32 [n, 7], rows of `adamw_scalars`.
        rng: int64 [2], (seed, offset): bf16 parameters are rounded stochastically; None: to nearest even.
            fp32 parameters need no rounding.
    """
    start = 0
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        numel = param.numel()
        if grad is not None and numel:
            first = _State(exp_avg, exp_avg_absmax, start, numel, signed=True)
            second = _State(exp_avg_sq, exp_avg_sq_absmax, start, numel, signed=False)
            p, g = param.reshape(-1).float(), grad.reshape(-1).float()
            p, m, v = step(p, g, first.read(), second.read(), scalars[index])
            rounded = round_parameter(p, param.dtype, rng, index)
            param.copy_(rounded.view(param.shape))
            first.write(m)
            second.write(v)
        start += state_tiles(numel) * STATE_TILE


def step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2, lines 6 to 12, fp32 [numel] each: the parameter and its two moments after the step.

    Bias corrections are in the scalars: step_size = lr / (1 - beta1^t), root2 = sqrt(1 - beta2^t).
    """
    # On p's device: torch divides by a number from elsewhere as a product with its reciprocal.
    decay, weight1, beta2, weight2, step_size, root2, eps = scalars.to(p.device).unbind()
    p = p * decay
    m = m + weight1 * (g - m)
    v = beta2 * v + (weight2 * g) * g
    p = p - (step_size * m) / (square_root(v) / root2 + eps)
    return p, m, v


def square_root(v: Tensor) -> Tensor:
    """The fp32 root, rounded to nearest, as IEEE has it: torch's own is off by a bit now and then on a CPU.

    The root of an fp32 number is no nearer to where rounding changes than 2^-27 of an ulp, which is 4 ulps of fp64.
    """
    return v.double().sqrt().float()


# --- State in 8 bits (8-bit Optimizers, section 2) --------------------------------------------------


class _State:
    """One parameter's part of a moment: read as fp32, written in the form that it is held in."""

    def __init__(
        self, flat: Tensor, absmax: Tensor | None, start: int, numel: int, signed: bool
    ) -> None:
        self._held, self._signed, self._absmax = flat[start : start + numel], signed, absmax
        if absmax is not None:
            block = start // STATE_BLOCKSIZE
            self._absmax = absmax[block : block + num_blocks(numel, STATE_BLOCKSIZE)]

    def read(self) -> Tensor:
        if self._absmax is None:
            return self._held
        return dequantize_state(self._held, self._absmax, self._signed)

    def write(self, values: Tensor) -> None:
        if self._absmax is None:
            self._held.copy_(values)
        else:
            codes, absmax = quantize_state(values, self._signed)
            self._held.copy_(codes)
            self._absmax.copy_(absmax)


def dequantize_state(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """codebook[code] * absmax: uint8 [numel] and fp32 [blocks] to fp32 [numel]."""
    values = state_codebook(signed, codes.device)[codes.long()]
    return (to_blocks(values, STATE_BLOCKSIZE) * absmax[:, None]).view(-1)[: codes.numel()]


def quantize_state(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The inverse, to the nearest code: fp32 [numel] to uint8 [numel] and fp32 [blocks].

    No threshold is below a NaN, as it has no order: its code is 0, and the NaN stays in absmax.
    """
    normalized, absmax = normalize(to_blocks(values, STATE_BLOCKSIZE))
    flat = normalized.view(-1)[: values.numel()]
    ordered = flat.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    rank = torch.bucketize(ordered, state_thresholds(signed, values.device))
    return rank.to(torch.uint8), absmax


# --- Rounding of parameters -------------------------------------------------------------------------


def round_parameter(
    p: Tensor, dtype: torch.dtype, rng: Tensor | None, index: int, first: int = 0
) -> Tensor:
    """fp32 [numel] in the dtype of parameter number `index`: to nearest even, or bf16 stochastically.

    p begins at element `first` of the parameter.

    Sixteen random bits are added below the last bit that bf16 keeps, and the rest is cut off: the result is
    the neighbour above with the probability of the distance from the one below. bf16 has fp32's exponents,
    so this holds for subnormal numbers too.
    """
    if rng is None or dtype != torch.bfloat16:
        return p.to(dtype)
    bits = p.view(torch.int32).long() + random_bits(rng, index, first, p.numel()).to(p.device)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(p.isnan(), p.to(dtype), rounded)


def random_bits(rng: Tensor, index: int, first: int, numel: int) -> Tensor:
    """int64 [numel] in [0, 2^16): the upper bits of a hash of (seed, offset), parameter and element."""
    element = torch.arange(first, first + numel, device=rng.device)
    return hash_u32(parameter_key(rng, index) ^ element) >> 16


def parameter_key(rng: Tensor, index: int | Tensor) -> Tensor:
    """The key of parameter number `index` in the call with (seed, offset): int64 in [0, 2^32)."""
    seed, offset = rng.unbind()
    return hash_u32(hash_u32(hash_u32(seed) ^ (offset & UINT32)) ^ index)
