"""What the ops check at the entrance. Each check raises ValueError or TypeError that names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora.kernels import formats


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as they are listed in a message."""
    return ", ".join(str(dtype) for dtype in dtypes)


def check_float(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """The tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {names(dtypes)}; got {tensor.dtype}")


def check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    """The tensor has two dimensions; returns them."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions; got shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The tensor has this dtype and this shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}; got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")


def check_devices(**tensors: Tensor | None) -> None:
    """All are on the device of the first. With one on the meta device, an op would return garbage."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, expected = next(iter(devices.items()))
    for name, device in devices.items():
        if device != expected:
            raise ValueError(f"{name} must be on the device of {first}, {expected}; got {device}")


def check_quantized(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    scale_format: str,
    numel: int,
) -> None:
    """These are the parts of a quantized tensor of `numel` elements."""
    formats.check_format(format)
    formats.check_blocksize(blocksize)
    check_tensor("packed", packed, torch.uint8, (formats.packed_bytes(numel),))
    blocks = formats.num_blocks(numel, blocksize)
    if nested_absmax is None:
        check_tensor("absmax", absmax, torch.float32, (blocks,))
    else:
        check_nested("absmax", absmax, nested_absmax, nested_offset, scale_format, blocks)


def check_nested(
    name: str,
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor | None,
    scale_format: str,
    blocks: int,
) -> None:
    """These are the parts of double-quantized scales; `name` is what the caller calls the codes."""
    formats.check_scale_format(scale_format)
    if nested_offset is None:
        raise ValueError("nested_offset must be given with nested_absmax; got None")
    nested_blocks = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
    check_tensor(name, codes, torch.uint8, (blocks,))
    check_tensor("nested_absmax", nested_absmax, torch.float32, (nested_blocks,))
    check_tensor("nested_offset", nested_offset, torch.float32, ())


def check_dropout(rng: Tensor | None, dropout: float) -> None:
    """The probability is one, and there is a seed where something is dropped."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
    if rng is not None:
        check_tensor("rng", rng, torch.int64, (2,))
    elif dropout:
        raise ValueError(
            "rng must be given, an int64 tensor (seed, offset), where dropout > 0; got None"
        )
