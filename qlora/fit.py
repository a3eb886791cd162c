"""Will it fit? Which cards a plan fits, what to change where it does not, and the table that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from qlora.config import QLoRAConfig
from qlora.memory import MemoryPlan, plan_memory
from qlora.recipe import TrainConfig

GIB = 2**30

CARDS = (8, 16, 24, 48, 80, 141)
"""GiB of memory of the usual cards."""

RESERVE = GIB
"""Of a card's memory, for the CUDA context and for gaps between torch's allocations: an assumption."""

_Settings = tuple[QLoRAConfig, TrainConfig]

_WITH_AND_WITHOUT: tuple[dict[str, bool], ...] = (
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": False, "offload_checkpoints": False},
)

_ROWS = {
    "weights": "base weights, 4 bits",
    "scales": "their scales",
    "dense": "embeddings, output layer, norms",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries",
}


@dataclass(frozen=True)
class Option:
    """Settings, and the flags of the command line that lead to them."""

    flags: tuple[str, ...]
    lora: QLoRAConfig
    train: TrainConfig


def options(lora: QLoRAConfig, train: TrainConfig) -> list[Option]:
    """The settings as they are, then with more and more changes, the least painful first."""
    found = [Option((), lora, train)]
    for flag, change in _CHANGES.items():
        last = found[-1]
        changed = change(last.lora, last.train)
        if changed != (last.lora, last.train):
            found.append(Option((*last.flags, flag), *changed))
    return found


def _one_at_a_time(lora: QLoRAConfig, train: TrainConfig) -> _Settings:
    """The same optimizer step, an example at a time."""
    steps = train.batch_size
    return lora, replace(train, micro_batch_size=1, gradient_accumulation_steps=steps)


_CHANGES: dict[str, Callable[[QLoRAConfig, TrainConfig], _Settings]] = {
    "--gradient-checkpointing": lambda lora, t: (lora, replace(t, gradient_checkpointing=True)),
    "--adapter-dtype bfloat16": lambda lora, t: (replace(lora, adapter_dtype="bfloat16"), t),
    "--batch 1": _one_at_a_time,
    "--optimizer paged_adamw_8bit": lambda lora, t: (
        lora,
        replace(t, optimizer="paged_adamw_8bit"),
    ),
    "--offload-checkpoints": lambda lora, t: (lora, replace(t, offload_checkpoints=True)),
    "--rank 16": lambda lora, t: (replace(lora, rank=min(lora.rank, 16)), t),
    "--length 256": lambda lora, t: (lora, replace(t, max_length=min(t.max_length, 256))),
}


def table(config: Any, lora: QLoRAConfig, train: TrainConfig) -> str:
    """What a training step takes, part by part, with and without gradient checkpointing.

    Args:
        config: the model's transformers config.
        lora, train: as for `plan_memory`.
    """
    plans = [
        plan_memory(config, lora, replace(train, **checkpointing))
        for checkpointing in _WITH_AND_WITHOUT
    ]
    lines = [f"{'':<33}{'gradient checkpointing':>29}{'none':>29}"]
    lines.append(f"{'':<33}" + 2 * f"{'bytes':>19}{'GiB':>10}")
    for item in fields(MemoryPlan):
        lines.append(_line(_ROWS[item.name], [getattr(plan, item.name) for plan in plans]))
    lines.append(_line("total at the peak", [plan.total for plan in plans]))
    return "\n".join(lines)


def _line(name: str, sizes: list[int]) -> str:
    return f"{name:<33}" + "".join(f"{size:>19,}{size / GIB:>10.2f}" for size in sizes)


def cards(config: Any, lora: QLoRAConfig, train: TrainConfig) -> str:
    """A line per card: whether it is large enough, or what to change; arguments as for `table`."""
    ladder = options(lora, train)

    @cache
    def plan(step: int) -> MemoryPlan:  # made as far as a card needs it
        return plan_memory(config, ladder[step].lora, ladder[step].train)

    lines = [f"On a card of, with {RESERVE / GIB:g} GiB left for CUDA itself:"]
    for card in CARDS:
        answers = (_answer(option, plan(step), card) for step, option in enumerate(ladder))
        answer = next(filter(None, answers), None) or _too_small(plan(len(ladder) - 1))
        lines.append(f"{card:>5} GiB  {answer}")
    return "\n".join(lines)


def _answer(option: Option, plan: MemoryPlan, card: int) -> str | None:
    """None if it does not fit."""
    room = card * GIB - RESERVE - plan.total
    pages = option.train.optimizer.startswith("paged")
    if room + pages * plan.optimizer < 0:
        return None
    given = f"with {' '.join(option.flags)}" if option.flags else "fits"
    if room < 0:
        return f"{given}, {-room / GIB:.1f} GiB of optimizer states paged out to the host"
    return f"{given}, {room / GIB:.1f} GiB to spare"


def _too_small(least: MemoryPlan) -> str:
    needed = (least.total + RESERVE) / GIB
    return f"too small: {needed:.1f} GiB with all that could be changed; take a smaller model"
