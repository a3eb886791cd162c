"""What an adapter of a model is, in PEFT's terms: the fields that its files and its run depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qlora import peft_format
from qlora.adapter import Adapter
from qlora.adapters import hosts, plain_name, sole_adapter
from qlora.experts import stack_sizes
from qlora.fingerprint import common_base, same_settings
from qlora.kernels.user_formats import stored_codebook
from qlora.lora_layer import LoRALayer
from qlora.peft_experts import stacked_names
from qlora.saved_modules import SavedModule


def adapter_settings(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """All that an adapter's run and files depend on: its settings, by PEFT's way of putting them, and its base's."""
    name = sole_adapter(model, name)
    layers, stacks = adapted_layers(model, name), stack_sizes(model)
    adapters = {where: layer.adapters[name] for where, layer in layers.items()}
    common = same_settings({where: _of_adapter(adapter) for where, adapter in adapters.items()})
    init = same_settings(
        {w: found for w, h in layers.items() if (found := _init(h, h.adapters[name]))}
    )
    base = common_base(layers)
    codebook = stored_codebook(base["format"])
    ranks = {where: adapter.rank for where, adapter in adapters.items()}
    alphas = {where: peft_format.integral(adapter.alpha) for where, adapter in adapters.items()}
    return {
        **dict(zip(("rank", "rank_pattern"), peft_format.patterns(ranks, stacks), strict=True)),
        **dict(zip(("alpha", "alpha_pattern"), peft_format.patterns(alphas, stacks), strict=True)),
        **common,
        "modules_to_save": sorted(saved_modules(model, name)),
        **base,
        **init,
        **({} if codebook is None else {"codebook": codebook}),
    }


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
        raise ValueError(f"model must have an adapter {name!r} in a linear layer; it has none")
    return found


def saved_modules(model: nn.Module, name: str) -> dict[str, SavedModule]:
    return {
        where: host
        for where, host in hosts(model).items()
        if isinstance(host, SavedModule) and name in host.adapters
    }


def _init(layer: LoRALayer, adapter: Adapter) -> dict[str, Any]:
    """How the base was made, where that is not by quantizing alone; LoftQ in one iteration changes the adapter only."""
    for started in (layer, adapter):
        if started.init != "lora":
            return {"init": started.init, "init_iterations": started.init_iterations}
    return {}


def _of_adapter(adapter: Adapter) -> dict[str, Any]:
    return {
        "rslora": adapter.rslora,
        "dora": adapter.magnitude is not None,
        "dropout": adapter.dropout,
        "dtype": str(adapter.lora_a.dtype).removeprefix("torch."),
    }


def peft_config(
    model: nn.Module,
    settings: Mapping[str, Any],
    layers: Mapping[str, LoRALayer],
    stacks: Mapping[str, int],
) -> dict[str, Any]:
    stacked = stacked_names(layers, stacks)
    if stacked and settings["dora"]:
        raise ValueError(
            f"dora must be False for experts ({stacked[0]}): PEFT's files have no place for it"
        )
    plain = [name for name in layers if not peft_format.is_expert(name, stacks)]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": settings["rank"],
        "rank_pattern": settings["rank_pattern"],
        "lora_alpha": settings["alpha"],
        "alpha_pattern": settings["alpha_pattern"],
        "use_rslora": settings["rslora"],
        "use_dora": settings["dora"],
        "lora_dropout": 0.0
        if stacked
        else settings["dropout"],  # PEFT allows no other with experts
        "target_modules": _target_modules(model, plain),
        **({"target_parameters": stacked} if stacked else {}),
        "modules_to_save": settings["modules_to_save"] or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
    }


def _task_type(model: nn.Module) -> str | None:
    """What PEFT's AutoPeftModel... classes look for."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _target_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The last parts of the names (q_proj, ...) where these single out the layers, else all names."""
    names = set(names)
    last_parts = {_last_part(name) for name in names}
    everything = (plain_name(name) for name, _ in model.named_modules())
    matched = {name for name in everything if _last_part(name) in last_parts}
    return sorted(last_parts if matched == names else names)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
