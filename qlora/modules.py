"""Linear layers with a LoRA adapter: `QLoRALinear` over a 4-bit base, `LoRALinear` over a dense one."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.config import QLoRAConfig
from qlora.functional import qlora_linear
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the layer of GPT-2 that transformers calls Conv1D: a linear with weight [k, n]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _weight_shape(linear: nn.Module) -> torch.Size:
    """(n, k) of a linear layer, whichever way its weight lies."""
    return linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape


class LoRALayer(nn.Module):
    """What both linear layers share: the adapter, and how it is switched, reset and merged.

    Attributes:
        in_features, out_features: k and n.
        fan_in_fan_out: the layer replaced a Conv1D, whose weight is [k, n].
        lora_a, lora_b: parameters A [r, k] and B [n, r] in `config.adapter_dtype`; None if the layer has no
            adapter.
        scaling, dropout: see `QLoRAConfig`.
        adapter_enabled: set to False to hear the base alone.
        bias: [n], frozen, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module, config: QLoRAConfig, adapter: bool) -> None:
        super().__init__()
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = _weight_shape(linear)
        self.rank = config.rank if adapter else 0
        self.scaling, self.dropout = config.scaling, config.dropout
        self.adapter_enabled = True
        bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        )
        self.register_parameter("bias", bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        if adapter:
            factory = {"device": linear.weight.device, "dtype": config.adapter_torch_dtype}
            self.lora_a = nn.Parameter(torch.empty(self.rank, self.in_features, **factory))
            self.lora_b = nn.Parameter(torch.empty(self.out_features, self.rank, **factory))
            self.reset_adapter()

    def reset_adapter(self) -> None:
        """Start anew: A uniform within 1 / sqrt(k), B zero, so that the layer equals its base."""
        if self.lora_a is not None:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
            nn.init.zeros_(self.lora_b)

    @abstractmethod
    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""

    @property
    @abstractmethod
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight before it was quantized, or of a later `.to(dtype)`."""

    def merged_weight(self) -> Tensor:
        """W + scaling * B A, dense [n, k], summed in fp32."""
        weight = self.base_weight()
        if self.lora_a is None:
            return weight
        return weight + self.scaling * (self.lora_b.detach().float() @ self.lora_a.detach().float())

    def _adapter(self) -> tuple[Tensor | None, Tensor | None]:
        return (self.lora_a, self.lora_b) if self.adapter_enabled else (None, None)

    def _active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias},"
            f" rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"
        )


class QLoRALinear(LoRALayer):
    """A frozen 4-bit linear layer with a trainable LoRA adapter (QLoRA, section 3, equation 5).

    Make one with `from_linear`. Its state dict holds the packed weight and scales as buffers, the data type
    as a small extra state, and the adapter, and loads back strictly. `.to(dtype)` leaves the scales in fp32.
    """

    _SCALES = ("absmax", "nested_absmax", "nested_offset")

    def __init__(
        self, linear: nn.Module, quantized: QuantizedTensor, config: QLoRAConfig, adapter: bool
    ) -> None:
        super().__init__(linear, config, adapter)
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
    ) -> QLoRALinear:
        """Quantize a linear layer.

        Args:
            linear: an `nn.Linear`, or a transformers Conv1D. It is not changed.
            config: data type, and the adapter's rank, alpha and dropout.
            adapter: whether the layer gets an adapter.
            quantized: its weight [n, k] if it has been quantized already (tied weights).
        """
        if config.format is None:
            raise ValueError("config.format must name a 4-bit data type; got None (see LoRALinear)")
        if quantized is not None and quantized.shape != _weight_shape(linear):
            raise ValueError(
                f"quantized must have shape {tuple(_weight_shape(linear))};"
                f" got {tuple(quantized.shape)}"
            )
        if quantized is None:
            weight = linear.weight.mT if is_conv1d(linear) else linear.weight
            quantized = quantize_4bit(
                weight, config.format, config.blocksize, config.double_quant, config.scale_format
            )
        return cls(linear, quantized, config, adapter)

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

    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""
        return dequantize_4bit(self.weight, torch.float32)

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight before it was quantized, or of a later `.to(dtype)`."""
        return self._base_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] to [..., n]: see `qlora_linear`."""
        return qlora_linear(
            x, self.weight, self.bias, *self._adapter(), self.scaling, self._active_dropout()
        )

    def extra_repr(self) -> str:
        scales = self.scale_format or "fp32"
        return f"{super().extra_repr()}, {self.format}, blocksize={self.blocksize}, scales={scales}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLoRALinear:
        """Casts keep the scales in fp32, where 16 bits would spoil the base; `base_dtype` follows them."""
        before = {name: getattr(self, name) for name in self._SCALES}
        super()._apply(fn, recurse)
        self._base_dtype = fn(torch.empty(0, dtype=self._base_dtype)).dtype
        for name, scale in before.items():
            moved = getattr(self, name)
            if scale is not None and moved.dtype != scale.dtype:
                setattr(self, name, scale.to(moved.device))
        return self

    def get_extra_state(self) -> Tensor:
        """What the buffers mean, as the UTF-8 bytes of a JSON object: a tensor, so that any file can hold it."""
        meaning = {
            "format": self.format,
            "blocksize": self.blocksize,
            "scale_format": self.scale_format,
            "shape": [self.out_features, self.in_features],
        }
        return torch.tensor(list(json.dumps(meaning).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse buffers of another data type, which would load without complaint and decode to noise."""
        given = json.loads(bytes(state.tolist()))
        expected = json.loads(bytes(self.get_extra_state().tolist()))
        if given != expected:
            raise ValueError(f"state_dict must hold a weight with {expected}; got {given}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Look at the extra state first: torch does so last, when the buffers have been overwritten."""
        if (key := f"{prefix}_extra_state") in state_dict:
            self.set_extra_state(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRALinear(LoRALayer):
    """A frozen dense linear layer with a trainable LoRA adapter: the 16-bit baseline (LoRA, section 4.1)."""

    def __init__(self, linear: nn.Module, config: QLoRAConfig, adapter: bool = True) -> None:
        super().__init__(linear, config, adapter)
        weight = linear.weight.detach()
        self.weight = nn.Parameter(
            weight.mT if self.fan_in_fan_out else weight, requires_grad=False
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: QLoRAConfig, adapter: bool = True
    ) -> LoRALinear:
        """Wrap an `nn.Linear` or a transformers Conv1D; the weight is shared, not copied."""
        return cls(linear, config, adapter)

    def base_weight(self) -> Tensor:
        """The base's dense weight [n, k] in fp32."""
        return self.weight.float()

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base's weight."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] to [..., n]: x W^T + bias + scaling * dropout(x) A^T B^T."""
        y = F.linear(x, self.weight, self.bias)
        lora_a, lora_b = self._adapter()
        if lora_a is None:
            return y
        h = F.linear(F.dropout(x, self._active_dropout()), lora_a.to(x.dtype))
        return y + self.scaling * F.linear(h, lora_b.to(x.dtype))
