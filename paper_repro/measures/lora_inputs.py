"""The adapters' inputs, which their gradients need: how much of them is held at once (QLoRA, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from paper_repro.measures.one_step import LORA, RECIPE
from qlora import quantize_model
from qlora.memory import trace_step
from qlora.shapes import meta_model
from qlora.trace import AllocationTrace


class _AdapterInputs(AllocationTrace):
    """Also takes down which memory the inputs of layers with an adapter lie in."""

    def __init__(self) -> None:
        super().__init__("meta")
        self.inputs: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.qlora.qlora_forward.default:
            self.inputs.add(self.number(args[0]))
        return super().__torch_dispatch__(func, types, args, kwargs)


def at_once(config: Any, checkpointing: bool) -> int:
    """The most bytes of adapters' inputs that a step holds at once."""
    model = meta_model(config, torch.bfloat16)
    quantize_model(model, LORA)
    trace = _AdapterInputs()
    trace_step(model, replace(RECIPE, gradient_checkpointing=checkpointing), trace)
    return trace.highest(trace.inputs)
