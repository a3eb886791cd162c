"""Adapters of experts in PEFT's layout: one pair of factors for all experts of a stacked parameter.

PEFT adapts a 3-D parameter with `target_parameters`. For E experts of rank r each it holds A [r E, k], expert e in
rows e r to (e + 1) r, and B [n, r E], expert e in columns e, E + e, 2 E + e, ... The rank and alpha of its config
are those of one expert. Where both parameters of a module are adapted it wraps the module twice, the second
parameter outermost, and its keys name the wrappers: `experts.base_layer.lora_A.weight` is gate_up_proj's and
`experts.lora_A.weight` down_proj's (peft, tuners/lora/layer.py, ParamWrapper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""A [r, k] and B [n, r]."""


@torch.no_grad()
def stack(factors: Mapping[str, Factors], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """PEFT's tensors of the experts' adapters, by their keys without "base_model.model.".

    Args:
        factors: by the layers' names; those of layers that are no experts are passed over. An expert without
            an adapter gets zeros where others of its stack have one.
        sizes: see `experts.stack_sizes`.

    Raises:
        ValueError: experts of one stack differ in rank.
    """
    stacks = stacked_names(factors, sizes)
    tensors = {}
    for name, prefix in _prefixes(stacks, sizes).items():
        given = [factors.get(f"{name}.{expert}") for expert in range(sizes[name])]
        a, b = _stack(name, given)
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    return tensors


def unstack(
    tensors: Mapping[str, Tensor], parameters: Iterable[str], sizes: Mapping[str, int]
) -> dict[str, Factors]:
    """The adapters of single experts, by the layers' names: the reverse of `stack`.

    Args:
        tensors: PEFT's, by keys without "base_model.model."; others than the experts' are passed over.
        parameters: `target_parameters` of its config: full names of stacks, or their ends after a dot.
        sizes: see `experts.stack_sizes`.

    Raises:
        ValueError: the model has no such stack, or a tensor is missing or not of that many experts.
    """
    stacks = []
    for parameter in parameters:
        found = [name for name in sizes if f".{name}".endswith(f".{parameter}")]
        if not found:
            raise ValueError(
                f"target_parameters: the model has no experts {parameter!r}; it has"
                f" {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in sizes)) or 'none'}"
            )
        stacks += found
    factors = {}
    for name, prefix in _prefixes(stacks, sizes).items():
        a, b = (_tensor(tensors, f"{prefix}.lora_{factor}.weight") for factor in "AB")
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) % sizes[name]:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            wants = f"[r E, k] and [n, r E] for E = {sizes[name]} experts"
            raise ValueError(f"{prefix}: lora_A and lora_B must be {wants}; got {shapes}")
        columns = b.reshape(len(b), -1, sizes[name]).unbind(-1)
        parts = zip(a.chunk(sizes[name]), columns, strict=True)
        factors |= {f"{name}.{expert}": part for expert, part in enumerate(parts)}
    return factors


def stacked_names(layers: Iterable[str], sizes: Mapping[str, int]) -> list[str]:
    """The stacks that some of the layers belong to: full names, which PEFT takes as `target_parameters`."""
    parents = {layer.rpartition(".")[0] for layer in layers}
    return [name for name in sizes if name in parents]


def _prefixes(stacks: Iterable[str], sizes: Mapping[str, int]) -> dict[str, str]:
    """What PEFT's keys of each adapted stack begin with. `sizes` has a module's stacks in PEFT's order."""
    adapted = set(stacks)
    prefixes: dict[str, str] = {}
    depth: dict[str, int] = {}
    for name in reversed(list(sizes)):
        if name in adapted:
            module = name.rpartition(".")[0]
            prefixes[name] = module + ".base_layer" * depth.get(module, 0)
            depth[module] = depth.get(module, 0) + 1
    return {name: prefixes[name] for name in sizes if name in adapted}


def _stack(name: str, factors: list[Factors | None]) -> Factors:
    shapes = {(a.shape, b.shape) for a, b in filter(None, factors)}
    if len(shapes) > 1:
        ranks = sorted(a[0] for a, _ in shapes)
        raise ValueError(f"{name}: PEFT's format has one rank for all experts; got {ranks}")
    first = next(filter(None, factors))
    none = tuple(torch.zeros_like(factor) for factor in first)
    pairs = [pair or none for pair in factors]
    a = torch.cat([pair[0] for pair in pairs])
    return a, torch.stack([pair[1] for pair in pairs], dim=-1).flatten(1)


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{key} is missing")
    return tensors[key]
