"""What the ops check at the entrance. Each check raises ValueError or TypeError that names the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def check_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    states: Mapping[str, Tensor],
    absmax: Mapping[str, Tensor | None],
    scalars: Tensor,
    rng: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """These are the arguments of a step: parameters with their gradients, and state for all of them."""
    if len(grads) != len(params):
        raise ValueError(
            f"grads must have one entry for each of {len(params)} params; got {len(grads)}"
        )
    if not params:
        return
    first = params[0]
    check_float("params[0]", first, dtypes)
    _check_alike("params", params, first)
    _check_alike("grads", grads, first)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None and grad.shape != param.shape:
            raise ValueError(
                f"grads[{i}] must have the shape of params[{i}], {tuple(param.shape)}; "
                f"got {tuple(grad.shape)}"
            )
    size = sum(formats.state_tiles(param.numel()) for param in params) * formats.STATE_TILE
    dtype = states["exp_avg"].dtype
    check_float("exp_avg", states["exp_avg"], (torch.float32, torch.uint8))
    for name, state in states.items():
        _check_buffer(name, state, dtype, size, first.device)
    for name, scale in absmax.items():
        if (scale is None) != (dtype == torch.float32):
            wanted = "given for states in uint8" if scale is None else "None for states in float32"
            raise ValueError(f"{name} must be {wanted}")
        if scale is not None:
            blocks = size // formats.STATE_BLOCKSIZE
            _check_buffer(name, scale, torch.float32, blocks, first.device)
    check_tensor("scalars", scalars, torch.float32, (len(params), 7))
    check_on_host("scalars", scalars)
    if rng is not None:
        check_tensor("rng", rng, torch.int64, (2,))
        check_on_host("rng", rng)
        if first.dtype == torch.float16:
            raise TypeError(
                "rng must be None for params in float16: only bfloat16 is rounded at random"
            )


def _check_alike(name: str, tensors: Sequence[Tensor | None], first: Tensor) -> None:
    """All have the dtype and the device of the first parameter. There may be hundreds, at every step."""
    dtype, device = first.dtype, first.device
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name}[{i}] must have the dtype of params[0], {dtype}; got {tensor.dtype}"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}[{i}] must be on the device of params[0], {device}; got {tensor.device}"
            )


def _check_buffer(
    name: str, tensor: Tensor, dtype: torch.dtype, size: int, device: torch.device
) -> None:
    """A flat tensor without gaps, as it is updated in place."""
    check_tensor(name, tensor, dtype, (size,))
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of params[0], {device}; got {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got stride {tensor.stride()}")


def check_on_host(name: str, tensor: Tensor) -> None:
    """The tensor is on the CPU, where it is read."""
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU; got {tensor.device}")
