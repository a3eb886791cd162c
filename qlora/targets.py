"""Which of a model's modules are meant by `target_modules` and `modules_to_save`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qlora.config import ALL_LINEAR


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
