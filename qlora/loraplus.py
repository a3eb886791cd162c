"""LoRA+: a higher learning rate for the factor B (Hayou et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def loraplus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimizer of torch: B's learning rate is `ratio` times A's.

    With one rate for both, the wider a model the less they learn. The paper recommends 16, and an `lr` below
    LoRA's. All that is not a factor B goes with A: DoRA's magnitudes, modules that are trained whole.

    Args:
        model: with adapters.
        lr: A's learning rate.
        ratio: at least 1.

    Returns:
        Two groups with "params", "lr" and "lr_ratio", which is 1 and `ratio`; a group without parameters is left out.

    Raises:
        ValueError: nothing is trainable, or `ratio` is below 1 or not finite.
    """
    if not 1 <= ratio < math.inf:
        raise ValueError(f"ratio must be at least 1 and finite; got {ratio}")
    groups = {1.0: [], float(ratio): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = name.rpartition(".")[2] == "lora_b"
            groups[float(ratio) if is_b else 1.0].append(parameter)
    if not any(groups.values()):
        raise ValueError(
            "model must have adapters to train: call quantize_model(model) first, or set_adapter(model, name)"
        )
    return [
        {"params": parameters, "lr": lr * own, "lr_ratio": own}
        for own, parameters in groups.items()
        if parameters
    ]
