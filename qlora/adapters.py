"""The adapters of a model: several on one base, switched, weighted, combined and dropped.

The base is never changed by any of this, and answers as before where no adapter is in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import nn

from qlora.adapter import Adapter, AdapterHost, check_name
from qlora.config import MAX_RANK, QLoRAConfig
from qlora.experts import ExpertLinear, stack_sizes
from qlora.lora_layer import LoRALayer
from qlora.model_parts import is_conv1d, plain_name, replace_module, weight_shape
from qlora.modules import LoRALinear
from qlora.saved_modules import SavedModule, as_saved_module
from qlora.targets import (
    check_no_experts,
    choose_layers,
    find_linears,
    is_expert,
    output_layers,
    pattern_name,
    saved_names,
)

Selection = str | Mapping[str, float] | None
Hosts = Mapping[str, AdapterHost]


def hosts(model: nn.Module) -> dict[str, AdapterHost]:
    """The modules that can hold adapters, by name.

    Raises:
        ValueError: the model has none, as it was not converted.
    """
    if not (found := _found_hosts(model)):
        raise ValueError("model must have adapters: call quantize_model(model, config) first")
    return found


def _found_hosts(model: nn.Module) -> dict[str, AdapterHost]:
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, AdapterHost)
    }


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's adapters, in the order in which they came."""
    return _names(_found_hosts(model))


def _names(found: Hosts) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for host in found.values() for name in host.adapters))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters in use."""
    return _active(hosts(model))


def _active(found: Hosts) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for host in found.values() for name in host.active))


def sole_adapter(model: nn.Module, name: str | None = None) -> str:
    """`name`, if the model has such an adapter; without one, that of the one adapter in use."""
    found = hosts(model)
    if name is not None:
        _check_known(found, [name])
        return name
    active = _active(found)
    if len(active) != 1:
        known = ", ".join(_names(found)) or "none"
        used = ", ".join(active) or "none"
        raise ValueError(
            f"model must have one adapter in use: call set_adapter(model, name); in use are {used}, "
            f"the model has {known}"
        )
    return active[0]


# --- Which are in use -------------------------------------------------------------------------------


def set_adapter(model: nn.Module, adapter: Selection) -> None:
    """Use an adapter from now on; it becomes trainable and the others frozen.

    Args:
        model: what `quantize_model` returned from.
        adapter: an adapter's name; or several with their weights, as {"a": 0.5, "b": 0.5}, whose weighted sum is
            added to the base; or None for the base alone.

    Raises:
        ValueError: no adapter of that name; or a weighted sum of what has none, as DoRA and whole modules.
    """
    found = hosts(model)
    weights = _selection(found, adapter)
    for host in found.values():
        host.choose(weights)


@contextmanager
def use_adapter(model: nn.Module, adapter: Selection | Sequence[str | None]) -> Iterator[None]:
    """Use an adapter within a `with` block; backward too belongs inside where gradient checkpointing is on.

    Afterwards all is as before: a `set_adapter` within holds no longer than the block.

    Args:
        model, adapter: as for `set_adapter`; or a sequence with an adapter's name, or None for the base, for
            each row of the batch.

    Raises:
        ValueError: as `set_adapter`; and by a layer, where its input does not have those rows.
    """
    found, rows = hosts(model), None
    if isinstance(adapter, Sequence) and not isinstance(adapter, str):
        rows = tuple(adapter)
        _check_known(found, [name for name in rows if name is not None])
        adapter = None
    weights = _selection(found, adapter)
    with _restored(found):
        for host in found.values():
            host.select(weights, rows)
            host.adapter_enabled = True
        yield


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Hear the base alone within a `with` block."""
    found = hosts(model)
    with _restored(found):
        for host in found.values():
            host.adapter_enabled = False
        yield


def enable_adapters(model: nn.Module, enabled: bool = True) -> None:
    """Switch the model's adapters on, or off: then it answers as its base alone.

    It holds until it is called again, or `set_adapter` is, which switches them on; `disable_adapters` holds for a
    `with` block. Either leaves what is selected, and what is trainable, as it is.
    """
    for host in hosts(model).values():
        host.adapter_enabled = enabled


@contextmanager
def _restored(found: Hosts) -> Iterator[None]:
    """Afterwards all is in use that was before, as far as it is still there; a set_adapter within is undone."""
    before = [
        (host, host.active, host.rows, host.adapter_enabled, host.chosen) for host in found.values()
    ]
    try:
        yield
    finally:
        for host, active, rows, enabled, chosen in before:
            if host.chosen is not chosen:
                host.choose(chosen)
            host.select(active, rows)
            host.adapter_enabled = enabled


def _selection(found: Hosts, adapter: Selection) -> dict[str, float]:
    """The weight of each adapter to use, by name."""
    if adapter is None:
        return {}
    if not isinstance(adapter, (str, Mapping)):
        raise TypeError(
            f"adapter must be a name, a mapping from names to weights, or None; got {adapter!r}"
            " (for rows use use_adapter)"
        )
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
    _check_weights(found, weights)
    if list(weights.values()) != [1.0] * min(len(weights), 1):
        _check_summable(found, weights)
    return weights


def _check_weights(found: Hosts, weights: Mapping[str, float]) -> None:
    _check_known(found, weights)
    for name, weight in weights.items():
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise TypeError(f"the weight of adapter {name!r} must be a number; got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} must be finite; got {weight}")


def _check_known(found: Hosts, names: Iterable[str]) -> None:
    known = _names(found)
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"no adapter {name!r} in the model; it has {listed}")


def _check_summable(found: Hosts, weights: Mapping[str, float]) -> None:
    """A weighted sum takes plain LoRA: what DoRA or a whole module computes is no sum."""
    used = ", ".join(weights)
    for where, host in found.items():
        parts = [host.adapters[name] for name in weights if name in host.adapters]
        if isinstance(host, SavedModule) and parts:
            raise ValueError(f"{used}: {where} is trained whole, of which there is no weighted sum")
        if any(adapter.magnitude is not None for adapter in parts):
            raise ValueError(
                f"{used}: {where} has a DoRA adapter, of which there is no weighted sum"
            )
        if len({adapter.dropout for adapter in parts}) > 1:
            raise ValueError(
                f"{used}: adapters in use together must have the same dropout ({where})"
            )
        if (rank := sum(adapter.rank for adapter in parts)) > MAX_RANK:
            raise ValueError(
                f"{used}: their ranks come to {rank} in {where}, of {MAX_RANK} that are allowed"
            )


# --- What the model has -----------------------------------------------------------------------------


def add_adapter(model: nn.Module, config: QLoRAConfig, name: str) -> None:
    """Add a fresh adapter, which changes nothing until it is trained.

    Args:
        model: what `quantize_model` returned from.
        config: the adapter's settings; what it says of the base does not matter.
        name: letters, digits, '_' and '-'.

    Raises:
        ValueError: there is one of that name, a name in `config` matches nothing or means experts that were left as
            they are, or `config.init` would change the base.
    """
    check_new_name(model, name)
    if config.target_modules is None:
        raise ValueError("target_modules must name the layers of the new adapter; got None")
    if config.init != "lora":
        raise ValueError(
            f"init must be 'lora' on a base that is quantized already; got {config.init!r}"
        )
    saved = saved_names(model, config.modules_to_save)
    linears, heads, _ = find_linears(model, saved)
    layers = {n: host for n, host in hosts(model).items() if isinstance(host, LoRALayer)}
    outputs = output_layers(model, layers)
    every = [*(name for name in layers if name not in outputs), *linears]
    chosen = choose_layers(config.target_modules, every, [*outputs, *heads])
    _check_experts_converted({name: linears[name] for name in chosen if name in linears})
    stacks = stack_sizes(model)
    if config.dora:
        check_no_experts(layer for layer in chosen if is_expert(layer, stacks))
    for layer in chosen:
        host = as_lora_layer(model, layer)
        if name not in host.adapters:  # one in two places
            host.add(name, host.new_adapter(config, pattern_name(layer, stacks)), fresh=True)
    for module in saved:
        as_saved_module(model, module).add(name, dtype=config.adapter_torch_dtype)
    settle_new(model, name)


def _check_experts_converted(layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            raise ValueError(
                f"target_modules must not mean {name}: its experts were left as they are, and only"
                " quantize_model splits them: let its target_modules name them too"
            )


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise ValueError unless a new adapter of the model may be called `name`."""
    check_name(name)
    if name in adapter_names(model):
        raise ValueError(
            f"there is an adapter {name!r} already: delete_adapter(model, {name!r}) drops it"
        )


def as_lora_layer(model: nn.Module, name: str) -> LoRALayer:
    """The layer called `name`; a plain linear one is wrapped, its weight stays dense.

    Raises:
        ValueError: it is no linear layer.
    """
    module = model.get_submodule(name)
    if isinstance(module, LoRALayer):
        return module
    if layer_shape(model, name) is None:
        raise ValueError(f"{name} is a {type(module).__name__}; adapters are for linear layers")
    layer = LoRALinear(module).train(module.training)
    module.requires_grad_(False)
    replace_module(model, module, layer)
    return layer


def layer_shape(model: nn.Module, name: str) -> tuple[int, int] | None:
    """(n, k) of the linear layer called `name`; None if there is no such layer that can be adapted."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    if any(isinstance(parent, SavedModule) for parent in parents):
        return None
    if isinstance(module, LoRALayer):
        return module.out_features, module.in_features
    if type(module) is nn.Linear or is_conv1d(module):
        return tuple(weight_shape(module))
    return None


def settle_new(model: nn.Module, name: str) -> None:
    """The first adapter of a model is used at once; others are frozen until they are."""
    found = hosts(model)
    if _active(found) or len(_names(found)) > 1:
        for host in found.values():
            if name in host.adapters:
                host.adapters[name].requires_grad_(False)
    else:
        set_adapter(model, name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop an adapter and its memory. If it was in use, the rest of what was in use is."""
    found = hosts(model)
    _check_known(found, [name])
    for host in found.values():
        host.remove(name)


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add an adapter that is the weighted sum of others: their factors side by side, so that ranks add up.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], exact but for one rounding of each
    element of B.

    Raises:
        ValueError: as `set_adapter`; or there is an adapter called `name`.
    """
    check_new_name(model, name)
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping from names to weights; got {weights!r}")
    found = hosts(model)
    _check_weights(found, weights)
    if not weights:
        raise ValueError("weights must name at least one adapter; got none")
    _check_summable(found, weights)
    for host in found.values():
        parts = [(host.adapters[n], w) for n, w in weights.items() if n in host.adapters]
        if parts:
            host.add(name, _side_by_side(parts))
    settle_new(model, name)


@torch.no_grad()
def _side_by_side(parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    lora_a = torch.cat([adapter.lora_a for adapter, _ in parts])
    lora_b = torch.cat([weight * a.scaling * a.lora_b.float() for a, weight in parts], dim=1)
    dropout = parts[0][0].dropout
    return Adapter(lora_a, lora_b.to(lora_a.dtype), alpha=lora_a.shape[0], dropout=dropout)


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the adapter called `name`, or of all in use, by their names in the model."""
    return {
        f"{where}.adapters.{own}.{parameter}": value
        for where, host in hosts(model).items()
        for own in ([name] if name is not None else host.active)
        if own in host.adapters
        for parameter, value in host.adapters[own].named_parameters()
    }
