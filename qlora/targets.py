"""Which of a model's modules are meant: its linear layers, by `target_modules`, and by `modules_to_save`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from qlora.adapter import AdapterHost
from qlora.config import ALL_LINEAR
from qlora.experts import expert_linears, is_experts
from qlora.model_parts import is_conv1d
from qlora.saved_modules import SavedModule


def find_linears(
    model: nn.Module, saved: Sequence[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], list[str]]:
    """The linear layers of a model by name; a module in two places comes twice.

    Args:
        saved: names of modules that are to be trained whole, and so left alone, as all within a `SavedModule` is.

    Returns:
        Those to quantize, those to adapt only where named (output embeddings, weights tied to one), and the names
        of the latter and of all others that are left alone.
    """
    is_head = _heads_of(model)
    saved = [*saved, *(name for name, m in model.named_modules() if isinstance(m, SavedModule))]
    linears, heads, left_alone = {}, {}, []
    experts: dict[nn.Module, dict[str, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_experts(module) and not _within(name, saved):
            layers = experts.setdefault(module, expert_linears(module))
            linears |= {f"{name}.{layer}": linear for layer, linear in layers.items()}
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        plain = type(module) is nn.Linear or is_conv1d(module)
        if _within(name, saved) or not plain:
            left_alone.append(name)
        elif is_head(module):
            left_alone.append(name)
            heads[name] = module
        else:
            linears[name] = module
    return linears, heads, left_alone


def saved_names(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """The full names of the modules that are trained as a whole; one within another is a part of that.

    Raises:
        ValueError: a name matches nothing, or what cannot be trained whole.
    """
    modules = dict(model.named_modules())
    wrapped = [name for name, module in modules.items() if isinstance(module, SavedModule)]
    names = (name for name in modules if not _within(name.rpartition(".")[0], wrapped))
    chosen = choose_by_end("modules_to_save", modules_to_save, names)
    chosen = [name for name in chosen if not _within(name.rpartition(".")[0], chosen)]
    for name in chosen:
        _check_trained_whole(name, modules[name])
    return chosen


def _check_trained_whole(name: str, module: nn.Module) -> None:
    if next(module.parameters(), None) is None:
        reason = "has no parameters"
    elif not isinstance(module, SavedModule) and any(
        isinstance(part, AdapterHost) for part in module.modules()
    ):
        reason = "is quantized, or has adapters: only the config of quantize_model can name it"
    else:
        return
    raise ValueError(f"modules_to_save must name modules to train whole; {name} {reason}")


def output_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Of layers that hold adapters, the names of those that "all-linear" leaves out: the output embeddings."""
    is_head = _heads_of(model)
    return [name for name, layer in layers.items() if is_head(layer)]


def choose_layers(
    target_modules: str | Sequence[str] | None, linears: Iterable[str], others: Iterable[str] = ()
) -> list[str]:
    """The names of layers that `target_modules` means, of which each part must mean at least one.

    Args:
        target_modules: as in QLoRAConfig.
        linears: names of the layers that "all-linear" means.
        others: names of layers that get an adapter only where they are named, as output embeddings.
    """
    if target_modules is None:
        return []
    linears = list(linears)
    if target_modules == ALL_LINEAR:
        return _at_least_one(linears, "target_modules", target_modules, linears)
    names = [*linears, *others]
    if isinstance(target_modules, str):
        pattern = _compile(target_modules)
        matching = [name for name in names if pattern.fullmatch(name)]
        return _at_least_one(matching, "target_modules", target_modules, names)
    return choose_by_end("target_modules", target_modules, names, lists=True)


def choose_by_end(
    argument: str, wanted: Iterable[str], names: Iterable[str], lists: bool = False
) -> list[str]:
    """The names that are one of those wanted or end in one after a dot; each must mean at least one.

    Args:
        lists: whether a list's name means all in it, as "experts.gate_up_proj" means "experts.gate_up_proj.3".
    """
    names = list(names)
    chosen: set[str] = set()
    for target in wanted:
        matching = [name for name in names if _ends_in(name, target, lists)]
        chosen.update(_at_least_one(matching, argument, target, names))
    return [name for name in names if name in chosen]


def check_no_experts(names: Iterable[str]) -> None:
    """Refuse DoRA on experts before it is trained: an adapter's files have no place for it."""
    for name in names:
        raise ValueError(
            f"dora must be False where experts get an adapter ({name}); name other target_modules"
        )


def pattern_name(layer: str, stacks: Mapping[str, int]) -> str:
    """What rank_pattern and alpha_pattern look at: the layer's name, an expert's stack."""
    return layer.rpartition(".")[0] if is_expert(layer, stacks) else layer


def is_expert(layer: str, stacks: Mapping[str, int]) -> bool:
    """Whether a layer is one of a stack of experts, see `experts.stack_sizes`."""
    return layer.rpartition(".")[0] in stacks


def _ends_in(name: str, target: str, lists: bool) -> bool:
    whole, _, number = name.rpartition(".")
    return f".{name}".endswith(f".{target}") or (
        lists and number.isdecimal() and f".{whole}".endswith(f".{target}")
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target_modules must be 'all-linear', names or a regular expression;"
            f" got {pattern!r} ({error})"
        ) from error


def _at_least_one(
    matching: list[str], argument: str, target: str, names: Sequence[str]
) -> list[str]:
    if not matching:
        what = "a linear layer" if argument == "target_modules" else "a module"
        raise ValueError(f"{argument} must match {what}; {target!r} matches none of {_some(names)}")
    return matching


def _some(names: Iterable[str], count: int = 8) -> str:
    """The distinct last parts of the names, a few of them."""
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names if name))
    return (
        ", ".join(parts[:count]) + (", ..." if len(parts) > count else "") or "(no linear layers)"
    )


def _within(name: str, wholes: Sequence[str]) -> bool:
    return any(f"{name}.".startswith(f"{whole}.") for whole in wholes)


def _heads_of(model: nn.Module) -> Callable[[nn.Module], bool]:
    """A test for linear layers, with adapters or without, that give the output embeddings or share an embedding's weight."""
    parts = set(_embedding_parts(model))
    weights = {id(part.weight) for part in parts if isinstance(part.weight, Tensor)}
    return lambda layer: layer in parts or id(layer.weight) in weights


def _embedding_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The input embeddings, and the output embeddings of every transformers model inside."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):  # a ModuleList where a model has several heads
            yield from (part for part in head.modules() if hasattr(part, "weight"))
