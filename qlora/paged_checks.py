"""What `PagedAdamW` refuses. Each check raises ValueError or TypeError that says what was given and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora.kernels.formats import STATE_BLOCKSIZE, num_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of parameters."""

Form = tuple[torch.Size, torch.dtype, torch.device]
"""Shape, dtype and device of a parameter."""

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
_STATES = ("exp_avg", "exp_avg_sq")
_ABSMAX = ("exp_avg_absmax", "exp_avg_sq_absmax")


def check_bits(bits: int) -> None:
    if bits not in (8, 32):
        raise ValueError(f"bits must be 32 or 8; got {bits!r}")


def check_group(group: Mapping[str, Any]) -> None:
    """The options of a parameter group are those of plain AdamW."""
    if missing := [name for name in _HYPERPARAMETERS if name not in group]:
        raise ValueError(f"a parameter group must have {', '.join(missing)}")
    for name in _REFUSED:
        if group.get(name):
            raise ValueError(f"{name} must be False, PagedAdamW has no such variant; got True")
    for name in ("lr", "eps", "weight_decay"):
        _check_number(name, group[name], math.inf)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers; got {betas!r}")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, 1.0)


def _check_number(name: str, value: Any, below: float) -> None:
    """A number, or a tensor of one, at least 0 and below a bound."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number; got a tensor of shape {tuple(value.shape)}")
    if not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= float(value) < below:
        bound = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be at least 0 and {bound}; got {float(value)}")


def check_parameters(params: Sequence[Tensor], stochastic_rounding: bool) -> None:
    """Different tensors that the kernel can update."""
    if len(set(params)) != len(params):
        raise ValueError("params must not name a parameter twice in a group")
    for i, param in enumerate(params):
        if param.dtype not in DTYPES:
            allowed = ", ".join(map(str, DTYPES))
            raise TypeError(f"params[{i}] must have one of the dtypes {allowed}; got {param.dtype}")
        if param.layout != torch.strided:
            raise TypeError(f"params[{i}] must be dense; got layout {param.layout}")
        if param.device.type not in ("cpu", "cuda"):
            raise ValueError(f"params[{i}] must be on the CPU or a GPU; got {param.device}")
        if stochastic_rounding and param.dtype == torch.float16:
            raise TypeError(
                "stochastic_rounding is for bfloat16 parameters (float32 need no rounding); "
                f"params[{i}] has {param.dtype}"
            )


def check_gradients(params: Sequence[Tensor]) -> None:
    for i, param in enumerate(params):
        grad = param.grad
        if grad is not None and grad.layout != torch.strided:
            raise TypeError(
                f"the gradient of parameter {i} must be dense; got layout {grad.layout}"
            )


def form(param: Tensor) -> Form:
    return param.shape, param.dtype, param.device


def check_form(index: int, param: Tensor, made_for: Form) -> None:
    """The parameter is what its state was made for: `param.data = ...` may put anything in its place."""
    if form(param) != made_for:
        now, then = (
            f"{tuple(s)}, {dtype}, {device}" for s, dtype, device in (form(param), made_for)
        )
        raise ValueError(
            f"parameter {index} must keep the shape, dtype and device that it had when its state was made, "
            f"{then}; got {now}"
        )


def check_keys(state_dict: Mapping[str, Any]) -> None:
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(f"state_dict must have {' and '.join(sorted(missing))}")


def check_groups(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Saved groups have the sizes of the optimizer's, and options that it takes."""
    sizes, own_sizes = ([len(group["params"]) for group in groups] for groups in (saved, own))
    if sizes != own_sizes:
        raise ValueError(
            f"state_dict must have parameter groups of {own_sizes} parameters; got {sizes}"
        )
    for group in saved:
        check_group(group)


def check_state(name: str, state: Mapping[str, Any], param: Tensor, bits: int) -> None:
    """A saved state of a parameter, called `name`, is what `bits` says, complete and of its size."""
    if "max_exp_avg_sq" in state:
        raise ValueError(f"state_dict: {name} has state of amsgrad, which PagedAdamW has not")
    expected = ("step", *_STATES, *(_ABSMAX if bits == 8 else ()))
    if "exp_avg_absmax" in state and bits == 32:
        raise ValueError(f"state_dict: {name} has 8-bit state, and this optimizer has bits=32")
    if missing := [key for key in expected if key not in state]:
        hint = ", as 8-bit state has" if missing == list(_ABSMAX) else ""
        raise ValueError(f"state_dict: {name} lacks {', '.join(missing)}{hint}")
    if unknown := sorted(state.keys() - set(expected)):
        raise ValueError(f"state_dict: {name} has unknown state {', '.join(map(str, unknown))}")
    _check_step(name, state["step"])
    blocks = (num_blocks(param.numel(), STATE_BLOCKSIZE),)
    for key in expected[1:]:
        shape = blocks if key in _ABSMAX else tuple(param.shape)
        is_code = bits == 8 and key in _STATES
        _check_saved(f"{name}.{key}", state[key], shape, is_code)


def _check_step(name: str, step: Any) -> None:
    if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise TypeError(f"state_dict: {name}.step must be a number; got {step!r}")
    if not (0 <= float(step) < 2**24 and float(step).is_integer()):
        raise ValueError(
            f"state_dict: {name}.step must be a whole number from 0 to 2**24 - 1; got {step!r}"
        )


def _check_saved(name: str, tensor: Any, shape: tuple[int, ...], is_code: bool) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state_dict: {name} must be a tensor; got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"state_dict: {name} must have shape {shape}; got {tuple(tensor.shape)}")
    if is_code and tensor.dtype != torch.uint8:
        raise TypeError(
            f"state_dict: {name} must be 8-bit codes (torch.uint8), as this optimizer has bits=8; "
            f"got {tensor.dtype}"
        )
    if not is_code and tensor.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"state_dict: {name} must be floating point; got {tensor.dtype}")
