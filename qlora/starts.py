"""First values of an adapter from the weight's singular vectors: LoftQ and PiSSA.

Both split a weight W [n, k] into a base Q and an adapter such that Q + scaling * B A is closer to W than
Q of W alone: quantization loses less of what is left, or the adapter holds the most of what it lost. Both
change the base, which has to be made anew in the same way when such an adapter is loaded again. Both decompose each
layer by itself: with many experts that is a decomposition for each expert and projection, and takes most of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qlora.config import QLoRAConfig
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit

Quantize = Callable[[Tensor], QuantizedTensor]
Factors = tuple[Tensor, Tensor]

# The largest singular vectors of a large matrix are found by subspace iteration, as the whole decomposition
# takes minutes for each layer. The fixed seed and start make it repeatable.
_EXACT_UP_TO = 512  # the smaller side
_EXTRA, _ROUNDS, _SEED = 32, 8, 0


def loftq(
    weight: Tensor,
    rank: int,
    scaling: float,
    quantize: Quantize,
    iterations: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """LoftQ (Li et al. 2023, algorithm 1): the adapter starts from the largest part of the quantization error.

    With one iteration the base is the weight quantized as usual.

    Args:
        weight: [n, k] in fp32.
        rank: r.
        scaling: the factor of the adapter's output, by which its factors are divided.
        quantize: of a matrix in fp32.
        iterations: T, how often it quantizes and decomposes in turn.
        dtype: what the adapter is held in; A and B are values of it.

    Returns:
        The base, A [r, k] and B [n, r] in fp32. The error of base + scaling * B A falls with the rank.
    """
    lora_a, lora_b = _zeros(weight, rank)
    for _ in range(iterations):
        base = quantize(weight - scaling * (lora_b @ lora_a))
        lora_a, lora_b = principal(weight - _dense(base), rank, scaling, dtype)
    return base, lora_a, lora_b


def pissa(
    weight: Tensor,
    rank: int,
    scaling: float,
    quantize: Quantize,
    iterations: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """QPiSSA (Meng et al. 2024, algorithm 1): the adapter starts as the largest part of the weight itself.

    What is left is quantized. Further iterations decompose what the base does not hold, as LoftQ does, but
    end with the quantization.

    Args, returns: as for `loftq`.
    """
    lora_a, lora_b = principal(weight, rank, scaling, dtype)
    base = quantize(weight - scaling * (lora_b @ lora_a))
    for _ in range(iterations - 1):
        lora_a, lora_b = principal(weight - _dense(base), rank, scaling, dtype)
        base = quantize(weight - scaling * (lora_b @ lora_a))
    return base, lora_a, lora_b


_METHODS = {"loftq": loftq, "pissa": pissa}


def quantize_and_start(
    weight: Tensor, config: QLoRAConfig, rank: int, scaling: float
) -> tuple[QuantizedTensor, Factors | None]:
    """The base of a layer, and its adapter's first values if they follow from the weight.

    Args:
        weight: [n, k] in fp32, fp16 or bf16. On the meta device only the sizes are worked out.
        config: how to quantize, and `init`.
        rank, scaling: the layer's; rank 0 for a layer without an adapter.

    Returns:
        The base, and A [r, k] and B [n, r] in fp32; None in their place where they are drawn at random.

    Raises:
        TypeError, ValueError: as `quantize_4bit` does.
    """

    def quantize(values: Tensor) -> QuantizedTensor:
        return quantize_4bit(
            values, config.format, config.blocksize, config.double_quant, config.scale_format
        )

    if rank == 0 or config.init == "lora":
        return quantize(weight), None
    if weight.is_meta or not torch.isfinite(weight).all():  # which quantizing refuses by name
        return quantize(weight), _zeros(weight, rank)
    method, dtype = _METHODS[config.init], config.adapter_torch_dtype
    values = weight.detach().float()
    base, *factors = method(values, rank, scaling, quantize, config.init_iterations, dtype)
    return replace(base, dtype=weight.dtype), tuple(factors)


def split(
    weight: Tensor, config: QLoRAConfig, rank: int, scaling: float
) -> tuple[Tensor, Factors | None]:
    """As `quantize_and_start` for a dense base: PiSSA without quantization (section 3).

    Returns:
        W - scaling * B A in the weight's dtype, or the weight itself, and the factors or None. "loftq" has no
        error to start from in a layer that stays dense, and gives None.

    Raises:
        ValueError: `config.init` is "loftq" and no layer is quantized.
    """
    if config.init == "loftq" and config.format is None:
        raise ValueError(
            "init must be 'lora' or 'pissa' on a dense base (format=None); got 'loftq', which starts "
            "from the error of quantization"
        )
    if rank == 0 or config.init != "pissa":
        return weight, None
    if weight.is_meta:
        return weight, _zeros(weight, rank)
    values = weight.detach().float()
    lora_a, lora_b = principal(values, rank, scaling, config.adapter_torch_dtype)
    return (values - scaling * (lora_b @ lora_a)).to(weight.dtype), (lora_a, lora_b)


def principal(
    matrix: Tensor, rank: int, scaling: float, dtype: torch.dtype = torch.float32
) -> Factors:
    """A [r, k] and B [n, r] with scaling * B A the best approximation of that rank to a matrix [n, k] in fp32.

    Each gets the square root of the singular values. A rank above min(n, k) leaves the rest zero. Up to 512
    on the smaller side the decomposition is exact; above, scaling * B A is as near to the matrix as the
    best is, within 0.1% for weights and for quantization errors, whose singular values fall the least
    (4096 x 4096 at rank 64 on two cores: under a second, where the exact one takes 17).
    """
    u, s, vt = _largest(matrix, rank)
    root = (s / scaling).sqrt()
    lora_a, lora_b = _zeros(matrix, rank)
    lora_a[: len(s)] = (root[:, None] * vt).to(dtype)
    lora_b[:, : len(s)] = (u * root).to(dtype)
    return lora_a, lora_b


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [n, r], S [r] and V^T [r, k] of the largest singular values; r is at most min(n, k)."""
    width = rank + _EXTRA
    if min(matrix.shape) <= max(_EXACT_UP_TO, 2 * width):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    generator = torch.Generator().manual_seed(_SEED)  # on the CPU: the same start on every device
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ start).Q
        start = torch.linalg.qr(matrix.mT @ basis).Q
    u, s, vt = torch.linalg.svd(matrix @ start, full_matrices=False)
    return u[:, :rank], s[:rank], (vt @ start.mT)[:rank]


def _dense(base: QuantizedTensor) -> Tensor:
    return dequantize_4bit(base, torch.float32)


def _zeros(weight: Tensor, rank: int) -> Factors:
    """A and B of zeros, in fp32."""
    n, k = weight.shape
    return (
        weight.new_zeros(rank, k, dtype=torch.float32),
        weight.new_zeros(n, rank, dtype=torch.float32),
    )
