"""bitsandbytes' tensors of a 4-bit weight, and ours: the same codes and scales under other names.

A weight that is called `weight` is in bitsandbytes' state dicts and files

    weight                               the packed codes: uint8 [ceil(n k / 2), 1], or the same bytes in a wider
                                         dtype, the "quant storage", filled up with zeros to a whole element
    weight.absmax                        fp32 [blocks], or uint8 [blocks] if double-quantized
    weight.quant_map                     fp32 [16], the codebook
    weight.nested_absmax                 fp32 [ceil(blocks / 256)], if double-quantized
    weight.nested_quant_map              fp32 [256], likewise
    weight.quant_state.bitsandbytes__nf4 uint8: a JSON object with the type, block sizes, dtype, shape [n, k] and,
                                         likewise, the mean that was subtracted from the scales; or ..__fp4

Blocks run over the flattened weight and the even element has the high nibble, as in `QuantizedTensor`: no bit is
changed in either direction. Read from bitsandbytes 0.50; it has written the same since 0.41.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import formats
from qlora.quantized import QuantizedTensor, dtype_name

TYPES = ("nf4", "fp4")
SCALES = "dynamic8"  # the one data type of double-quantized scales that bitsandbytes has
STATE = "quant_state.bitsandbytes__"
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_PARTS = ("absmax", "quant_map")
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_dtype": str, "nested_offset": float}
_INT8_ENDINGS = ("SCB", "weight_format", "weight.SCB")

_CPU = torch.device("cpu")


def check_base(format: str, scale_format: str) -> None:
    """Refuse a data type of weights, or of their scales ("" for fp32), that bitsandbytes does not have."""
    advice = "quantize with another, or keep qlora's own layout"
    if format not in TYPES:
        allowed = " or ".join(TYPES)
        raise ValueError(f"format must be {allowed} for bitsandbytes; got {format!r}: {advice}")
    if scale_format not in ("", SCALES):
        raise ValueError(
            f"scale_format must be {SCALES} for bitsandbytes; got {scale_format!r}: {advice}"
        )


def to_bitsandbytes(
    quantized: QuantizedTensor, storage: torch.dtype = torch.uint8, name: str = "weight"
) -> dict[str, Tensor]:
    """bitsandbytes' tensors of a weight by their keys, of which `name` is the first.

    Args:
        quantized: "nf4" or "fp4", its scales in fp32 or "dynamic8".
        storage: the dtype that the packed codes are stored as: uint8, bfloat16, float16 or float32.
        name: what the weight is called.

    Raises:
        ValueError: bitsandbytes has no such format; the message says which.
    """
    nested = bool(quantized.scale_format)
    check_base(quantized.format, quantized.scale_format)
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {STORAGES}; got {storage!r}")
    state: dict[str, Any] = {
        "quant_type": quantized.format,
        "blocksize": quantized.blocksize,
        "dtype": dtype_name(quantized.dtype),
        "shape": list(quantized.shape),
    }
    parts = {
        "absmax": quantized.absmax,
        "quant_map": _codebook(quantized.format).to(quantized.device),
    }
    if nested:
        parts["nested_absmax"] = quantized.nested_absmax
        scales = formats.scale_codebook(SCALES, quantized.device)
        parts["nested_quant_map"] = scales.clone()  # no file holds two names of one memory
        state["nested_blocksize"] = formats.NESTED_BLOCKSIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = quantized.nested_offset.item()
    parts[f"{STATE}{quantized.format}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu"
    )
    packed = _stored(quantized.packed, storage)
    return {name: packed} | {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _stored(packed: Tensor, storage: torch.dtype) -> Tensor:
    """[bytes / itemsize, 1]: zeros fill the last element up."""
    missing = -packed.numel() % storage.itemsize
    filled = torch.cat([packed, packed.new_zeros(missing)]) if missing else packed
    return filled.view(storage).view(-1, 1)


def _codebook(format: str) -> Tensor:
    """As bitsandbytes has it: FP4's second zero without its sign."""
    return formats.codebook(format, _CPU) + 0.0


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """The weight that bitsandbytes' tensors hold, on their device; the packed codes and scales share their memory.

    Args:
        tensors: among others, the tensor `name` and those whose keys begin with `name` and a dot.
        name: what the weight is called.

    Raises:
        ValueError: a tensor is missing or not what bitsandbytes writes; the message names its key.
    """
    parts = {
        key[len(name) + 1 :]: part for key, part in tensors.items() if key.startswith(f"{name}.")
    }
    if name not in tensors:
        raise ValueError(f"{name}: missing, although {name}.{min(parts, default='')} is there")
    state = _read_state(parts, name)
    nested = "nested_offset" in state
    endings = (*_PARTS, *(_NESTED_PARTS if nested else ()), f"{STATE}{state['quant_type']}")
    for ending in endings:
        if ending not in parts:
            raise ValueError(
                f"{name}.{ending}: missing, although {name} is in bitsandbytes' layout"
            )
    if unknown := parts.keys() - set(endings):
        raise ValueError(f"{name}.{min(unknown)}: not a tensor of {name}, whose others are known")
    shape, blocksize = state["shape"], state["blocksize"]
    blocks = formats.num_blocks(math.prod(shape), blocksize)
    absmax_dtype = torch.uint8 if nested else torch.float32
    _check(f"{name}.absmax", parts["absmax"], absmax_dtype, (blocks,))
    _check_values(f"{name}.quant_map", parts["quant_map"], _codebook(state["quant_type"]))
    if nested:
        groups = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
        _check(f"{name}.nested_absmax", parts["nested_absmax"], torch.float32, (groups,))
        scales = formats.scale_codebook(SCALES, _CPU)
        _check_values(f"{name}.nested_quant_map", parts["nested_quant_map"], scales)
    floating = "nested_absmax" if nested else "absmax"
    if not torch.isfinite(parts[floating]).all():
        raise ValueError(f"{name}.{floating}: must be finite; it has NaN or infinity")
    return QuantizedTensor(
        packed=_packed(name, tensors[name], math.prod(shape)),
        absmax=parts["absmax"],
        nested_absmax=parts["nested_absmax"] if nested else None,
        nested_offset=_offset(state, tensors[name].device) if nested else None,
        format=state["quant_type"],
        blocksize=blocksize,
        scale_format=SCALES if nested else "",
        shape=torch.Size(shape),
        dtype=DTYPES[state["dtype"]],
    )


def _offset(state: Mapping[str, Any], device: torch.device) -> Tensor:
    """In fp32 whatever the default dtype is."""
    return torch.tensor(state["nested_offset"], dtype=torch.float32, device=device)


def _packed(name: str, stored: Tensor, numel: int) -> Tensor:
    """uint8 [ceil(numel / 2)] of what any storage dtype holds."""
    if stored.dtype not in STORAGES:
        raise ValueError(
            f"{name}: must have dtype uint8, or one of {STORAGES[1:]}; got {stored.dtype}"
        )
    count = formats.packed_bytes(numel)
    _check(name, stored, stored.dtype, (-(-count // stored.dtype.itemsize), 1))
    return stored.contiguous().view(-1).view(torch.uint8)[:count]


def _check(key: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{key}: must have dtype {dtype}; got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key}: must have shape {shape}; got {tuple(tensor.shape)}")


def _check_values(key: str, tensor: Tensor, own: Tensor) -> None:
    """Codes mean nothing by another codebook."""
    _check(key, tensor, own.dtype, tuple(own.shape))
    if not torch.equal(tensor.to(_CPU), own):
        raise ValueError(f"{key}: must be bitsandbytes' table of {len(own)} values; got another")


def _read_state(parts: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The JSON object with what is no tensor, each field checked."""
    key = state_key({f"{name}.{ending}": None for ending in parts}, name)
    state = read_state(key, parts[key[len(name) + 1 :]])
    if not key.endswith(f"{STATE}{state['quant_type']}"):
        raise ValueError(f"{key}: quant_type must be as in the key; got {state['quant_type']!r}")
    return state


def state_key(keys: Iterable[str], name: str) -> str:
    """The key of the JSON object that says what the weight `name` is; a ValueError unless there is one."""
    allowed = [f"{name}.{STATE}{kind}" for kind in TYPES]
    found = [key for key in keys if key.startswith(f"{name}.quant_state")]
    if len(found) != 1 or found[0] not in allowed:
        given = ", ".join(found) or "none"
        raise ValueError(f"{name}: needs one of {' or '.join(allowed)}; got {given}")
    return found[0]


def read_state(key: str, tensor: Tensor) -> dict[str, Any]:
    """What the tensor `key` says of its weight, checked; the nested fields are there if it is double-quantized.

    Raises:
        ValueError: it is no such JSON, or a field is missing, unknown or not one of the allowed.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        got = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{key}: must be the bytes of a JSON object, uint8 [length]; got {got}")
    try:
        state = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: is no JSON ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{key}: must be a JSON object; got {type(state).__name__}")
    expected = _FIELDS | (_NESTED_FIELDS if state.keys() & _NESTED_FIELDS.keys() else {})
    for field, kind in expected.items():
        if field not in state:
            raise ValueError(f"{key}: {field} is missing")
        if type(state[field]) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(
                f"{key}: {field} must be of type {kind.__name__}; got {state[field]!r}"
            )
    if unknown := state.keys() - expected.keys():
        raise ValueError(f"{key}: has an unknown field {min(unknown)!r}")
    try:
        _check_fields(state)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return state


def _check_fields(state: Mapping[str, Any]) -> None:
    choices = {"quant_type": TYPES, "dtype": tuple(DTYPES), "blocksize": formats.BLOCKSIZES}
    choices |= {"nested_dtype": ("float32",), "nested_blocksize": (formats.NESTED_BLOCKSIZE,)}
    for field, allowed in choices.items():
        if field in state and state[field] not in allowed:
            options = ", ".join(map(str, allowed))
            raise ValueError(f"{field} must be one of {options}; got {state[field]!r}")
    if not all(type(size) is int and 0 <= size < 2**63 for size in state["shape"]):
        raise ValueError(f"shape must hold sizes; got {state['shape']}")
    largest = torch.finfo(torch.float32).max
    if not abs(state.get("nested_offset", 0)) <= largest:
        raise ValueError(f"nested_offset must be finite; got {state['nested_offset']!r}")


def weight_of(key: str) -> str | None:
    """The name of the weight that a key of a state dict belongs to; None if it is a tensor of its own."""
    for ending in (*_PARTS, *_NESTED_PARTS):
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}")
    name, found, _ = key.rpartition(".quant_state.")
    return name if found else None


def check_not_int8(keys: Iterable[str]) -> None:
    """Refuse bitsandbytes' 8-bit weights, which are another thing."""
    for key in keys:
        if key.endswith(tuple(f".{ending}" for ending in _INT8_ENDINGS)) or key in _INT8_ENDINGS:
            raise ValueError(
                f"{key}: belongs to a weight in 8 bits (LLM.int8), which is not supported; "
                "load a 16-bit or a 4-bit model"
            )


def translated(
    state_dict: dict[str, Any], prefix: str, weight: QuantizedTensor, meaning: Tensor
) -> dict[str, Any]:
    """A state dict with our keys in place of bitsandbytes', for a layer to load; the given one if it has none.

    Args:
        state_dict: it is not changed.
        prefix: the layer's, as in `Module._load_from_state_dict`.
        weight: the layer's own, whose shape, data type and block size the given one must have.
        meaning: the layer's extra state, which is then that of the given one as well.

    Raises:
        ValueError: what is there is damaged, in 8 bits, or differs from the layer; the message names the key.
    """
    name = f"{prefix}weight"
    theirs = {key for key in state_dict if key.startswith(f"{name}.")}
    check_not_int8(
        [f"{prefix}{ending}" for ending in _INT8_ENDINGS if f"{prefix}{ending}" in state_dict]
    )
    if not theirs:
        return state_dict
    given = from_bitsandbytes(
        {key: state_dict[key] for key in theirs | ({name} & state_dict.keys())}, name
    )
    for field in ("shape", "format", "blocksize", "scale_format"):
        if (got := getattr(given, field)) != (own := getattr(weight, field)):
            got, own = (tuple(v) if field == "shape" else v for v in (got, own))
            raise ValueError(f"{name}: must have {field} {own!r} for this layer; got {got!r}")
    ours = {key: value for key, value in state_dict.items() if key not in theirs and key != name}
    ours |= {f"{prefix}packed": given.packed, f"{prefix}absmax": given.absmax}
    if given.scale_format:
        ours[f"{prefix}nested_absmax"] = given.nested_absmax
        ours[f"{prefix}nested_offset"] = given.nested_offset
    return ours | {f"{prefix}_extra_state": meaning}
