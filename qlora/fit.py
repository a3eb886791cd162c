"""Will it fit? A plan as a table, the cards that are large enough, and what to change for those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from qlora.config import QLoRAConfig
from qlora.convert import quantize_model
from qlora.memory import MemoryPlan, plan_memory
from qlora.recipe import TrainConfig
from qlora.shapes import meta_model

GIB = 2**30

CARDS = (8, 16, 24, 48, 80, 141)
"""GiB of memory of the usual cards, by their names. With error correction some show up to 6 % less."""

RESERVE = GIB
"""Of a card's memory, for the CUDA context and for gaps between torch's allocations: an assumption."""

_ROWS = {
    "weights": "base weights, 4 bits",
    "scales": "their scales",
    "dense": "left dense: embeddings, norms, ...",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "temporaries": "temporaries",
}
_Change = tuple[str, QLoRAConfig, TrainConfig]
"""A flag, and the settings with it."""


@dataclass(frozen=True)
class Option:
    """Settings, the flags of `qlora memory` that lead to them, and their plan."""

    flags: tuple[str, ...]
    lora: QLoRAConfig
    train: TrainConfig
    plan: MemoryPlan

    @property
    def pages(self) -> int:
        """Bytes that make room where it is short: optimizer states in unified memory."""
        return self.plan.optimizer if self.train.optimizer.startswith("paged") else 0


def report(config: Any, lora: QLoRAConfig, train: TrainConfig) -> Iterator[str]:
    """The planner's answer in three parts, each when it is worked out.

    Args:
        config: the model's transformers config.
        lora, train: as for `plan_memory`.
    """
    plans = {on: plan_memory(config, lora, _with_checkpointing(train, on)) for on in (True, False)}
    plan = plans[train.gradient_checkpointing]
    yield table(plans[True], plans[False])
    if lora.format and (
        dense := quantize_model(meta_model(config, torch.bfloat16), lora).notable_dense
    ):
        yield f"Left dense, as they are no linear layers: {dense}"
    yield "\n".join(cards(config, Option((), lora, train, plan)))


def _with_checkpointing(train: TrainConfig, on: bool) -> TrainConfig:
    offload = train.offload_checkpoints and on
    return replace(train, gradient_checkpointing=on, offload_checkpoints=offload)


def table(checkpointing: MemoryPlan, none: MemoryPlan) -> str:
    """Part by part, with gradient checkpointing and without."""
    lines = [f"{'':<36}{'gradient checkpointing':>30}{'none':>30}"]
    lines.append(f"{'':<36}" + 2 * f"{'bytes':>20}{'GiB':>10}")
    for item in fields(MemoryPlan):
        lines.append(
            _line(_ROWS[item.name], getattr(checkpointing, item.name), getattr(none, item.name))
        )
    lines.append(_line("total at the peak", checkpointing.total, none.total))
    return "\n".join(lines)


def _line(name: str, *sizes: int) -> str:
    return f"{name:<36}" + "".join(f"{size:>20,}{size / GIB:>10,.2f}" for size in sizes)


def cards(config: Any, wanted: Option) -> Iterator[str]:
    """A line per card: whether it is large enough, or what to change. No more is planned than that takes."""
    more, known = improvements(config, wanted), [wanted]
    yield f"On a card of, with {RESERVE / GIB:g} GiB for CUDA itself (with ECC some show up to 6 % less):"
    for card in CARDS:
        while (answer := _first_answer(known, card)) is None and (option := next(more, None)):
            known.append(option)
        yield f"{card:>5} GiB  {answer or _too_small(known[-1])}"


def _first_answer(options: list[Option], card: int) -> str | None:
    return next(filter(None, (_answer(option, card) for option in options)), None)


def improvements(config: Any, wanted: Option) -> Iterator[Option]:
    """More and more changes, the least painful first, each of which makes the peak lower."""
    best = wanted
    for change in _CHANGES:
        flags, lora, train = change(best.lora, best.train)
        if (lora, train) == (best.lora, best.train):
            continue
        plan = plan_memory(config, lora, train)
        if plan.total < best.plan.total:
            best = Option((*best.flags, flags), lora, train, plan)
            yield best


def _one_at_a_time(lora: QLoRAConfig, train: TrainConfig) -> _Change:
    """The same optimizer step, an example at a time."""
    steps = train.batch_size
    changed = replace(train, micro_batch_size=1, gradient_accumulation_steps=steps)
    return f"--batch 1 --accumulation {steps}", lora, changed


_CHANGES: tuple[Callable[[QLoRAConfig, TrainConfig], _Change], ...] = (
    lambda lora, t: ("--gradient-checkpointing", lora, replace(t, gradient_checkpointing=True)),
    lambda lora, t: ("--adapter-dtype bfloat16", replace(lora, adapter_dtype="bfloat16"), t),
    _one_at_a_time,
    lambda lora, t: (
        "--optimizer paged_adamw_8bit",
        lora,
        replace(t, optimizer="paged_adamw_8bit"),
    ),
    lambda lora, t: (
        "--offload-checkpoints",
        lora,
        replace(t, offload_checkpoints=t.gradient_checkpointing),
    ),
    lambda lora, t: ("--rank 16", replace(lora, rank=min(lora.rank, 16)), t),
    lambda lora, t: ("--length 256", lora, replace(t, max_length=min(t.max_length, 256))),
)


def _answer(option: Option, card: int) -> str | None:
    """None if it does not fit."""
    room = card * GIB - RESERVE - option.plan.total
    if room + option.pages < 0:
        return None
    given = f"with {' '.join(option.flags)}" if option.flags else "fits"
    if room < 0:
        return f"{given}, {-room / GIB:.1f} GiB of optimizer states paged out to the host"
    return f"{given}, {room / GIB:.1f} GiB to spare"


def _too_small(least: Option) -> str:
    needed = (least.plan.total - least.pages + RESERVE) / GIB
    flags = f" with {' '.join(least.flags)}" if least.flags else ""
    return f"too small: {needed:.1f} GiB are needed{flags}; take a smaller model"
