"""Linear layers with LoRA adapters: `QLoRALinear` over a 4-bit base, `LoRALinear` over a dense one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora import bnb_format, starts
from qlora.adapter import DEFAULT
from qlora.config import QLoRAConfig
from qlora.functional import qlora_linear
from qlora.kernels.user_formats import stored_codebook
from qlora.lora_layer import NO_FACTORS, Factors, LoRALayer
from qlora.model_parts import is_conv1d, weight_shape
from qlora.quantized import QuantizedTensor, dequantize_4bit


class QLoRALinear(LoRALayer):
    """A frozen 4-bit linear layer with a trainable LoRA adapter (QLoRA, section 3, equation 5).

    Make one with `from_linear`. Its state dict holds the packed weight and scales as buffers, the data type
    as a small extra state, an empty `weight`, and the adapter, and loads back strictly. `.to(dtype)` leaves the scales in fp32.
    """

    _SCALES = ("absmax", "nested_absmax", "nested_offset")
    _FLOAT32 = (*LoRALayer._FLOAT32, *_SCALES)

    def __init__(self, linear: nn.Module, quantized: QuantizedTensor) -> None:
        super().__init__(linear)
        self.format, self.blocksize = quantized.format, quantized.blocksize
        self.scale_format, self._base_dtype = quantized.scale_format, quantized.dtype
        for name in ("packed", *self._SCALES):
            self.register_buffer(name, getattr(quantized, name))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: QLoRAConfig,
        adapter: bool = True,
        quantized: QuantizedTensor | None = None,
        name: str = "",
    ) -> QLoRALinear:
        """Quantize a linear layer.

        Args:
            linear: an `nn.Linear`, or a transformers Conv1D. It is not changed.
            config: data type, and the adapter's rank, alpha and dropout.
            adapter: whether the layer gets an adapter, named "default".
            quantized: its weight [n, k] if it has been quantized already (tied weights).
            name: the layer's, which `config.rank_pattern` and `alpha_pattern` look at.
        """
        if config.format is None:
            raise ValueError("config.format must name a 4-bit data type; got None (see LoRALinear)")
        if quantized is not None and quantized.shape != weight_shape(linear):
            raise ValueError(
                f"quantized must have shape {tuple(weight_shape(linear))};"
                f" got {tuple(quantized.shape)}"
            )
        factors = None
        if quantized is None:
            weight = linear.weight.mT if is_conv1d(linear) else linear.weight
            size = config.rank_and_scaling(name) if adapter else (0, 1.0)
            quantized, factors = starts.quantize_and_start(weight, config, *size)
        return _with_adapter(cls(linear, quantized), config, adapter, name, factors)

    @property
    def weight(self) -> QuantizedTensor:
        """The frozen base weight (n, k) in 4 bits."""
        return QuantizedTensor(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.format,
            self.blocksize,
            self.scale_format,
            torch.Size((self.out_features, self.in_features)),
            self._base_dtype,
        )

    @weight.setter
    def weight(self, quantized: QuantizedTensor) -> None:
        """Put another weight of the same shape and data type in place, on whichever device it is."""
        for name in ("shape", "format", "blocksize", "scale_format"):
            given, own = getattr(quantized, name), getattr(self.weight, name)
            if given != own:
                raise ValueError(f"weight must have {name} {own!r}; got {given!r}")
        self._base_dtype = quantized.dtype
        for name in ("packed", *self._SCALES):
            setattr(self, name, getattr(quantized, name))
        self.base_changed()

    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""
        return dequantize_4bit(self.weight, torch.float32)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight before it was quantized, or of a later `.to(dtype)`."""
        return self._base_dtype

    @property
    def device(self) -> torch.device:
        """Where the base weight is."""
        return self.packed.device

    def _linear(self, x: Tensor, bias: Tensor | None, factors: Factors = NO_FACTORS) -> Tensor:
        return qlora_linear(x, self.weight, bias, *factors)

    def extra_repr(self) -> str:
        scales = self.scale_format or "fp32"
        return f"{super().extra_repr()}, {self.format}, blocksize={self.blocksize}, scales={scales}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLoRALinear:
        """`base_dtype` follows casts."""
        super()._apply(fn, recurse)
        self._base_dtype = fn(torch.empty(0, dtype=self._base_dtype)).dtype
        return self

    def get_extra_state(self) -> Tensor:
        """What the buffers mean, as the UTF-8 bytes of a JSON object: a tensor, so that any file can hold it."""
        meaning = {
            "format": self.format,
            "blocksize": self.blocksize,
            "scale_format": self.scale_format,
            "shape": [self.out_features, self.in_features],
        }
        if (codebook := stored_codebook(self.format)) is not None:
            meaning["codebook"] = codebook
        return torch.tensor(list(json.dumps(meaning).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse buffers of another data type, which would load without complaint and decode to noise."""
        given = json.loads(bytes(state.tolist()))
        expected = json.loads(bytes(self.get_extra_state().tolist()))
        if given != expected:
            raise ValueError(f"state_dict must hold a weight with {expected}; got {given}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, *args: Any) -> None:
        """With an empty `weight`, at which whoever looks for a dense one stops.

        transformers would fill a weight that it does not find in a folder with random numbers.
        """
        super()._save_to_state_dict(destination, prefix, *args)
        destination[f"{prefix}weight"] = torch.empty(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Look at the extra state first: torch does so last, when the buffers have been overwritten.

        A state dict of bitsandbytes' is taken as well.
        """
        state_dict = bnb_format.translated(state_dict, prefix, self.weight, self.get_extra_state())
        if (weight := state_dict.get(f"{prefix}weight")) is not None and not weight.numel():
            state_dict = {k: v for k, v in state_dict.items() if v is not weight}
        if (key := f"{prefix}_extra_state") in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(LoRALayer):
    """A frozen dense linear layer with a trainable LoRA adapter: the 16-bit baseline (LoRA, section 4.1)."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        self.weight = nn.Parameter(
            weight.mT if self.fan_in_fan_out else weight, requires_grad=False
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: QLoRAConfig, adapter: bool = True, name: str = ""
    ) -> LoRALinear:
        """Wrap an `nn.Linear` or a transformers Conv1D; the weight is shared, unless `config.init` changes it."""
        layer = cls(linear)
        size = config.rank_and_scaling(name) if adapter else (0, 1.0)
        weight, factors = starts.split(layer.weight.detach(), config, *size)
        if factors is not None:
            layer.weight = nn.Parameter(weight, requires_grad=False)
        return _with_adapter(layer, config, adapter, name, factors)

    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""
        return self.weight.detach().float()

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the base weight is."""
        return self.weight.device

    def _linear(self, x: Tensor, bias: Tensor | None, factors: Factors = NO_FACTORS) -> Tensor:
        y = F.linear(x, self.weight, bias)
        lora_a, lora_b, scaling, dropout = factors
        if lora_a is None:
            return y
        h = F.linear(F.dropout(x, dropout), lora_a.to(x.dtype))
        return y + scaling * F.linear(h, lora_b.to(x.dtype))


_Layer = TypeVar("_Layer", QLoRALinear, LoRALinear)


def _with_adapter(
    layer: _Layer,
    config: QLoRAConfig,
    adapter: bool,
    name: str,
    factors: tuple[Tensor, Tensor] | None,
) -> _Layer:
    """With a new adapter in use, which starts at random, or from the factors that its base was made for."""
    if adapter:
        new = layer.new_adapter(config, name, factors)
        layer.start = new.start
        layer.add(DEFAULT, new, fresh=True)
        layer.choose({DEFAULT: 1.0})
    return layer
