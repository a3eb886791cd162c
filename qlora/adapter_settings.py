"""What an adapter of a model is: its layers, and its settings as a QLoRAConfig."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora.adapter import Adapter, Start
from qlora.adapters import hosts, sole_adapter
from qlora.config import QLoRAConfig
from qlora.experts import stack_sizes
from qlora.fingerprint import common_base, same_settings
from qlora.lora_layer import LoRALayer
from qlora.peft_format import integral, patterns
from qlora.quantized import dtype_name
from qlora.saved_modules import SavedModule


def adapter_config(model: nn.Module, name: str | None = None) -> QLoRAConfig:
    """The settings of an adapter, by default of the one in use, and of its base; its layers are named in full.

    Raises:
        ValueError: no such adapter, or its layers differ in what a config has one place for only.
    """
    name = sole_adapter(model, name)
    layers, stacks = adapted_layers(model, name), stack_sizes(model)
    adapters = {where: layer.adapters[name] for where, layer in layers.items()}
    common = same_settings({where: _of_adapter(adapter) for where, adapter in adapters.items()})
    rank, ranks = patterns({where: a.rank for where, a in adapters.items()}, stacks)
    alpha, alphas = patterns({where: integral(a.alpha) for where, a in adapters.items()}, stacks)
    start = _common_start(layers, name)
    return QLoRAConfig(
        rank=rank,
        rank_pattern=ranks,
        alpha=alpha,
        alpha_pattern=alphas,
        target_modules=tuple(layers),
        modules_to_save=tuple(sorted(saved_modules(model, name))),
        init=start.init,
        init_iterations=start.iterations,
        **common,
        **common_base(layers),
    )


def adapted_layers(model: nn.Module, name: str) -> dict[str, LoRALayer]:
    """The linear layers that have the adapter called `name`.

    Raises:
        ValueError: none has.
    """
    found = {
        where: host
        for where, host in hosts(model).items()
        if isinstance(host, LoRALayer) and name in host.adapters
    }
    if not found:
        raise ValueError(
            f"model must have an adapter {name!r} in a linear layer; it has none: add_adapter(model, config, "
            f"{name!r}) adds one"
        )
    return found


def saved_modules(model: nn.Module, name: str) -> dict[str, SavedModule]:
    """The modules that the adapter called `name` trains whole."""
    return {
        where: host
        for where, host in hosts(model).items()
        if isinstance(host, SavedModule) and name in host.adapters
    }


def _common_start(layers: dict[str, LoRALayer], name: str) -> Start:
    """How the base was made, where that is not by quantizing alone; LoftQ in one iteration changes the adapter only."""
    found = {}
    for where, layer in layers.items():
        for start in (layer.start, layer.adapters[name].start):
            if start != Start():
                found.setdefault(where, {"init": start.init, "iterations": start.iterations})
    return Start(**same_settings(found))


def _of_adapter(adapter: Adapter) -> dict[str, Any]:
    """Fields of QLoRAConfig in which all its layers must agree."""
    return {
        "rslora": adapter.rslora,
        "dora": adapter.magnitude is not None,
        "dropout": adapter.dropout,
        "adapter_dtype": dtype_name(adapter.lora_a.dtype),
    }
