"""The memory planner: what a training step takes on a GPU, before anything runs.

    plan_memory(model_config("llama-65b"), QLoRAConfig(adapter_dtype="bfloat16"), TrainConfig()).total

What stays (weights, scales, adapters, gradients, optimizer states) is counted on the library's own objects, made
on the meta device. What comes and goes is the trace of a real forward and backward pass there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from qlora.config import QLoRAConfig
from qlora.convert import quantize_model
from qlora.evaluation import max_positions, module_modes, summed_loss
from qlora.folder_config import first_line
from qlora.kernels import tuning
from qlora.modules import QLoRALinear
from qlora.paged import state_bytes
from qlora.recipe import TrainConfig
from qlora.recompute import recomputing
from qlora.shapes import meta_model
from qlora.trace import AllocationTrace, FullBatch, as_on_a_gpu

CUBLAS_WORKSPACE = 2 * 32 * 2**20
"""What torch gives cuBLAS on an H100, in the thread of the forward pass and in that of the backward pass; a quarter
on cards before it."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the GPU at the moment of a training step when they are the most.

    Attributes:
        weights: the base's 4-bit codes.
        scales: their scales, double-quantized or not.
        dense: what stays dense: embeddings, output layer, norms, biases.
        adapters: the LoRA factors.
        gradients: of the adapters, as far as they exist at that moment.
        optimizer: the optimizer's states.
        activations: made in the forward pass: what the backward pass needs, or each block's input.
        temporaries: made in the backward pass, and the kernels' scratch memory.
    """

    weights: int
    scales: int
    dense: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, item.name) for item in fields(self))

    @property
    def base(self) -> int:
        """The frozen model."""
        return self.weights + self.scales + self.dense


def plan_memory(
    config: Any, lora: QLoRAConfig | None = None, train: TrainConfig | None = None
) -> MemoryPlan:
    """What a training step of a causal language model takes on a GPU.

    Batches are taken to be full: `micro_batch_size` examples of `max_length` tokens.

    Args:
        config: the model's transformers config: see `qlora.shapes.model_config`.
        lora: data type and adapters; by default QLoRAConfig().
        train: the recipe; by default Guanaco's. The precision "auto" means bfloat16.

    Raises:
        ValueError: the model takes no such length, `target_modules` matches nothing, or a step of the model
            cannot be worked out on the meta device.
    """
    lora, train = lora or QLoRAConfig(), train or TrainConfig()
    model = meta_model(config, _dtype(train))
    _check_length(model, train.max_length)
    quantize_model(model, lora)
    adapters = [p for p in model.parameters() if p.requires_grad]
    peak = _peak_of_step(model, adapters, train)
    return MemoryPlan(
        **static_bytes(model),
        optimizer=optimizer_bytes(
            [p.numel() for p in adapters], train.optimizer, adapters[0].dtype
        ),
        gradients=peak["gradients"],
        activations=peak["forward"],
        temporaries=peak["backward"] + _workspace(model, train),
    )


def static_bytes(model: torch.nn.Module) -> dict[str, int]:
    """`weights`, `scales`, `dense` and `adapters` of a quantized model, on whichever device it is."""
    layers = [module for module in model.modules() if isinstance(module, QLoRALinear)]
    quantized = {id(layer.packed): layer.weight for layer in layers}.values()  # tied ones once
    weights = sum(weight.packed.nbytes for weight in quantized)
    scales = sum(weight.nbytes for weight in quantized) - weights
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "weights": weights,
        "scales": scales,
        "dense": total - weights - scales - adapters,
        "adapters": adapters,
    }


def optimizer_bytes(sizes: Sequence[int], optimizer: str, dtype: torch.dtype) -> int:
    """Bytes of the states of an optimizer of `TrainConfig`, for parameters of these sizes."""
    if optimizer == "adamw_torch":  # two of the parameter's dtype, and a step counter in fp32
        return sum(2 * dtype.itemsize * size + 4 for size in sizes)
    return state_bytes(sizes, bits=8 if optimizer == "paged_adamw_8bit" else 32)


def _dtype(train: TrainConfig) -> torch.dtype:
    return torch.float32 if train.precision == "float32" else torch.bfloat16


def _check_length(model: torch.nn.Module, length: int) -> None:
    if length > (limit := max_positions(model)):
        raise ValueError(f"max_length must be at most {limit} for this model; got {length}")


def _peak_of_step(
    model: torch.nn.Module, adapters: Sequence[torch.nn.Parameter], train: TrainConfig
) -> Counter[str]:
    """What is made in a pass forward and back, at its peak: "forward", "backward" and "gradients"."""
    accumulated = train.gradient_accumulation_steps > 1
    trace = AllocationTrace("meta")
    if accumulated:  # they are there from the second micro-batch on
        for parameter in adapters:
            parameter.grad = torch.empty_like(parameter)
            trace.exclude(parameter.grad)
    try:
        trace_step(model, train, trace)
    except Exception as error:  # in a model's own code, which may do anything
        reason = first_line(error)[:200]
        name = type(model).__name__
        raise ValueError(f"config: a step of {name} cannot be worked out ({reason})") from error
    gradients = [parameter.grad for parameter in adapters if parameter.grad is not None]
    peak = trace.peak({"gradients": gradients})
    if accumulated:
        peak["gradients"] = sum(gradient.nbytes for gradient in gradients)
    return peak


def trace_step(model: torch.nn.Module, train: TrainConfig, trace: AllocationTrace) -> None:
    """Let `trace` look at a pass forward and back of a model on the meta device, in phases of these names.

    Args:
        model: a causal language model; its parameters and buffers are not counted.
        train: the batch, its length, and how activations are kept.
        trace: one for the meta device.
    """
    batch, length = train.micro_batch_size, train.max_length
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    trace.exclude(*model.parameters(), *model.buffers())
    with (
        module_modes(model, training=True),
        recomputing(model, train.gradient_checkpointing, train.offload_checkpoints),
        as_on_a_gpu(_dtype(train)),
        FullBatch(),
        trace,
    ):
        trace.phase = "forward"
        loss = summed_loss(model, inputs, ids.device)
        trace.phase = "backward"
        loss.backward()


def _workspace(model: torch.nn.Module, train: TrainConfig) -> int:
    """Scratch memory that the kernels take and give back: cuBLAS', and a slab of decoded weight."""
    layers = [module for module in model.modules() if isinstance(module, QLoRALinear)]
    largest = max((layer.weight.numel for layer in layers), default=0) * _dtype(train).itemsize
    many = train.micro_batch_size * train.max_length >= tuning.MANY_TOKENS
    return CUBLAS_WORKSPACE + (min(tuning.SLAB_BYTES, largest) if many else 0)
