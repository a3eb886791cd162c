"""The parts of a model, as torch and transformers have them: their kinds, names and places."""

from __future__ import annotations

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the layer of GPT-2 that transformers calls Conv1D: a linear with weight [k, n]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def weight_shape(linear: nn.Module) -> torch.Size:
    """(n, k) of a linear layer, whichever way its weight lies."""
    return linear.weight.shape[::-1] if is_conv1d(linear) else linear.weight.shape


def plain_name(name: str) -> str:
    """The name of a module or parameter without what `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in another's place, in all places where that is."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def rename_ties(model: nn.Module, before: str, after: str) -> None:
    """Tell transformers a module's new name, if it is one of those whose weights are tied by name."""
    for where, module in model.named_modules():
        prefix = f"{where}." if where else ""
        if not before.startswith(prefix):
            continue
        old, new = (f"{name.removeprefix(prefix)}." for name in (before, after))
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, attribute, None)
            if isinstance(ties, dict) and any(
                n.startswith(old) for pair in ties.items() for n in pair
            ):
                renamed = {_renamed(k, old, new): _renamed(v, old, new) for k, v in ties.items()}
                setattr(module, attribute, renamed)


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name
