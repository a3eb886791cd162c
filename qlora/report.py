"""`QuantizationReport`: what `quantize_model` did to a model, in figures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qlora.adapter import Adapter
from qlora.lora_layer import LoRALayer
from qlora.model_parts import is_conv1d
from qlora.modules import QLoRALinear

_NOTABLE = 0.03  # a part of all parameters that is worth a row of the report
_SHOWN = 4


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did; `print` it.

    Attributes:
        quantized: names of the layers that hold 4-bit weights now.
        adapted: names of the layers that got an adapter.
        left_alone: names of the linear layers that stay as they were (output embeddings, tied weights).
        quantized_parameters: weights held in 4 bits.
        dense_parameters: all other frozen parameters: embeddings, norms, biases, and whatever is no linear
            layer (the filters of a convolution, say).
        other_dense: of those the matrices that belong to no embedding and no linear layer, by name, with `*`
            for the numbers of layers, and how many weights go by that name; the most first.
        quantized_bytes: the bytes that these weights and their scales take.
        trainable_parameters: the adapters' parameters.
        bytes_before, bytes_after: all parameters and buffers of the model, adapters included.
    """

    quantized: tuple[str, ...]
    adapted: tuple[str, ...]
    left_alone: tuple[str, ...]
    quantized_parameters: int
    dense_parameters: int
    other_dense: tuple[tuple[str, int], ...]
    quantized_bytes: int
    trainable_parameters: int
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_parameter(self) -> float:
        """Mean over the quantized weights; 0 if there are none."""
        return 8 * self.quantized_bytes / max(self.quantized_parameters, 1)

    def __str__(self) -> str:
        rows = [
            ("quantized layers", f"{len(self.quantized):,}"),
            ("quantized parameters", f"{self.quantized_parameters:,}"),
            ("parameters left dense", f"{self.dense_parameters:,}"),
            ("bits per parameter", f"{self.bits_per_parameter:.3f}"),
            *self._adapter_rows(),
            ("linear layers left alone", ", ".join(self.left_alone) or "none"),
            *([("not linear, left dense", self.notable_dense)] if self.notable_dense else []),
            ("bytes before", _bytes(self.bytes_before)),
            ("bytes after", _bytes(self.bytes_after)),
        ]
        return "\n".join(f"{name:<26}{value}" for name, value in rows)

    def _adapter_rows(self) -> list[tuple[str, str]]:
        if not self.adapted:  # a base by itself
            return []
        return [
            ("layers with an adapter", f"{len(self.adapted):,}"),
            ("trainable parameters", f"{self.trainable_parameters:,}"),
        ]

    @property
    def notable_dense(self) -> str:
        """The parts of `other_dense`, in words, if they are a good part of the model; else ""."""
        total = self.quantized_parameters + self.dense_parameters
        if sum(count for _, count in self.other_dense) < _NOTABLE * total:
            return ""
        parts = [f"{name} ({count:,}, {count / total:.0%})" for name, count in self.other_dense]
        return ", ".join(parts[:_SHOWN] + (["..."] if len(parts) > _SHOWN else []))


def _bytes(count: int) -> str:
    return f"{count:,} ({count / 2**20:,.1f} MiB)"


def model_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {id(t): t for group in (model.parameters(), model.buffers()) for t in group}
    return sum(tensor.nbytes for tensor in tensors.values())


def report(
    model: nn.Module, layers: Mapping[str, LoRALayer], left_alone: Sequence[str], bytes_before: int
) -> QuantizationReport:
    """The report on a model that was converted.

    Args:
        layers: the new layers by name.
        left_alone: names of the linear layers that were not converted.
        bytes_before: `model_bytes` of the model as it was.
    """
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QLoRALinear)}
    weights = {id(layer.packed): layer.weight for layer in quantized.values()}
    return QuantizationReport(
        quantized=tuple(quantized),
        adapted=tuple(name for name, layer in layers.items() if layer.adapters),
        left_alone=tuple(left_alone),
        quantized_parameters=sum(weight.numel for weight in weights.values()),
        dense_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        other_dense=_other_dense(model),
        quantized_bytes=sum(weight.nbytes for weight in weights.values()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        bytes_before=bytes_before,
        bytes_after=model_bytes(model),
    )


def _other_dense(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """See `QuantizationReport.other_dense`."""
    known = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.Linear, LoRALayer, Adapter)) or is_conv1d(module)
        for parameter in module.parameters(recurse=False)
    }
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in known:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            counts[pattern] = counts.get(pattern, 0) + parameter.numel()
    return tuple(sorted(counts.items(), key=lambda item: -item[1]))
