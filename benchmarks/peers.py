"""The peers, holding the very bytes that ours hold: then all compute the same and one oracle serves all.

torchao is the exception. Its NF4 has a codebook of four digits, scales that are quantized linearly, and all of it
in the dtype of the weight: it is held to what its own bytes stand for.

Every function imports what it needs when it is called; a case lists it under `Contender.requires`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora.kernels import formats
from qlora.quantized import QuantizedTensor

BITSANDBYTES = ("bitsandbytes",)
TORCHAO = ("torchao",)
PEFT = ("peft",)
PEFT_OVER_BITSANDBYTES = ("peft", "bitsandbytes")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' warnings about what is optional or deprecated in them."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bitsandbytes_quantize(weight: Tensor, double_quant: bool) -> tuple[Tensor, Any]:
    """bitsandbytes' own NF4: the packed weight and its QuantState."""
    from bitsandbytes import functional

    return functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )


def from_bitsandbytes(packed: Tensor, state: Any) -> QuantizedTensor:
    """What bitsandbytes made, as one of ours."""
    nested = state.state2
    return QuantizedTensor(
        packed=packed.view(-1),
        absmax=state.absmax,
        nested_absmax=None if nested is None else nested.absmax,
        nested_offset=None if nested is None else state.offset,
        format=state.quant_type,
        blocksize=state.blocksize,
        scale_format="" if nested is None else "dynamic8",
        shape=torch.Size(state.shape),
        dtype=state.dtype,
    )


def bitsandbytes_state(q: QuantizedTensor, dtype: torch.dtype) -> Any:
    """The QuantState of a double-quantized NF4 tensor of ours; it decodes to `dtype`."""
    from bitsandbytes.functional import QuantState

    nested = QuantState(
        absmax=q.nested_absmax,
        blocksize=formats.NESTED_BLOCKSIZE,
        code=formats.scale_codebook(q.scale_format, q.device),
        dtype=torch.float32,
    )
    return QuantState(
        absmax=q.absmax,
        shape=q.shape,
        code=formats.codebook(q.format, q.device),
        blocksize=q.blocksize,
        quant_type=q.format,
        dtype=dtype,
        offset=q.nested_offset,
        state2=nested,
    )


def bitsandbytes_dequantize(packed: Tensor, state: Any) -> Tensor:
    from bitsandbytes import functional

    return functional.dequantize_4bit(packed, state)


def bitsandbytes_linear(q: QuantizedTensor, dtype: torch.dtype) -> nn.Module:
    """A Linear4bit without bias that holds a tensor of ours and computes in `dtype`."""
    with quiet():
        from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = q.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type=q.format, device="meta")
    layer.weight = Params4bit(
        q.packed.view(-1, 1).clone(),  # in eval it may repack its bytes in place
        requires_grad=False,
        quant_state=bitsandbytes_state(q, dtype),
        blocksize=q.blocksize,
        compress_statistics=True,
        quant_type=q.format,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = layer.weight.quant_state
    return layer


def torchao_quantize(weight: Tensor) -> Tensor:
    """torchao's own NF4, double-quantized: an NF4Tensor."""
    with quiet():
        from torchao.quantization import to_nf4

    return to_nf4(weight, block_size=64, scaler_block_size=256)


def torchao_oracle(weight: Any) -> Tensor:
    """What the bytes of an NF4Tensor stand for, in fp64 and without a rounding."""
    codes = torch.stack([weight.quantized_data >> 4, weight.quantized_data & 15], dim=-1)
    blocks = weight.quantized_scalers.double().view(-1, weight.scaler_block_size)
    scales = blocks / weight.quantization_factor.double()[:, None] + weight.scaler_mean.double()
    values = weight.nf4.double()[codes.long()].view(-1, weight.block_size)
    return (values * scales.view(-1, 1)).view(weight.shape)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """As PEFT's models are trained in bf16: its adapters are in fp32, and so would be their products without it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def peft_model(
    model: nn.Module,
    rank: int,
    alpha: float,
    target_modules: Any,
    dropout: float = 0.0,
    dora: bool = False,
) -> nn.Module:
    """The model with PEFT's LoRA or DoRA, on its Linear or Linear4bit layers.

    Adapters are in fp32, as PEFT's default.
    """
    with quiet():
        from peft import LoraConfig, get_peft_model

        # The mark by which PEFT finds bitsandbytes' layers; it means nothing to the others.
        model.is_loaded_in_4bit = True
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=target_modules,
            lora_dropout=dropout,
            use_dora=dora,
        )
        return get_peft_model(model, config)


def peft_layer(linear: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    """One linear layer with PEFT's LoRA."""
    holder = nn.Module()
    holder.layer = linear
    return peft_model(holder, rank, alpha, ["layer"], dropout).base_model.model.layer


def peft_adapter(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """A and B of PEFT's layer; if it is DoRA, its magnitude as well."""
    parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return tuple(part["default"].weight for part in parts if "default" in part)
