"""What a base is: its data type, and a checksum that tells one base from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from qlora.lora_layer import LoRALayer
from qlora.modules import QLoRALinear

_SAMPLES = 1 << 16  # of a layer's weight


def base_settings(layer: LoRALayer) -> dict[str, Any]:
    """Fields of QLoRAConfig that say what the layer's base is."""
    return layer.weight.settings if isinstance(layer, QLoRALinear) else {"format": None}


def common_base(layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """`base_settings` of the quantized layers, which must be the same; of a dense one where none is quantized."""
    quantized = {n: layer for n, layer in layers.items() if isinstance(layer, QLoRALinear)}
    return same_settings({name: base_settings(layer) for name, layer in quantized.items()}) or {
        "format": None
    }


def same_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The one set of values that all layers have; a ValueError names two that differ."""
    if not settings:
        return {}
    (first, expected), *others = settings.items()
    for name, other in others:
        for key, value in other.items():
            if value != expected.get(key):
                raise ValueError(
                    f"all adapted layers must have the same {key}; got {expected.get(key)!r} in "
                    f"{first} and {value!r} in {name}"
                )
    return dict(expected)


def base_fingerprint(layers: Mapping[str, LoRALayer]) -> str:
    """A short checksum of the layers' base weights.

    It is taken over evenly spaced samples of each weight. A quantized one is known by its codes,
    which are the same on every device, a dense one by its values in bfloat16, to which it may be
    cast in order to compute.
    """
    digest = hashlib.sha256()
    for name, layer in layers.items():
        is_dense = not isinstance(layer, QLoRALinear)
        weight = layer.weight.detach() if is_dense else layer.packed
        samples = weight.reshape(-1)[:: -(-weight.numel() // _SAMPLES)]
        values = samples.bfloat16().view(torch.int16) if is_dense else samples
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
