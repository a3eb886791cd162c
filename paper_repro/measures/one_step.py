"""One real training step of a LLaMA's shapes with random weights, and the memory that it takes.

On a GPU at full depth. On a CPU with a few layers of the true width, at two depths: where both take what the
planner says, the layers that are left are taken from it.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora import QLoRAConfig, QLoRALinear, quantize_4bit, quantize_model
from qlora.evaluation import module_modes
from qlora.loading import skeleton
from qlora.memory import plan_memory, static_bytes
from qlora.placing import start_adapters
from qlora.progress import Progress
from qlora.recipe import TrainConfig
from qlora.recompute import recomputing
from qlora.shapes import LLAMA, model_config
from qlora.trace import AllocationTrace
from qlora.train import make_optimizer, train_step

LORA = QLoRAConfig(rank=64, adapter_dtype="bfloat16")
"""All linear layers, NF4 with double quantization. With fp32 adapters 65B is beyond 48 GB."""

RECIPE = TrainConfig(
    micro_batch_size=1, gradient_accumulation_steps=1, max_length=512, precision="bfloat16"
)
"""A batch of one, of Figure 6's length; all else is Guanaco's."""

DEPTHS = (1, 3)
"""Layers that a CPU runs."""


def run(name: str, device: torch.device) -> dict[str, Any]:
    """Train a model of `qlora.shapes.LLAMA` for two steps and say what the second took.

    Returns:
        `steps`, one for each depth that was run; `peak_bytes` and `planned_bytes` of the full depth.
    """
    depth = LLAMA[name][1]
    depths = (depth,) if device.type == "cuda" else DEPTHS
    steps = [_steps(name, layers, device) for layers in depths]
    planned = plan_memory(model_config(name), LORA, RECIPE).total
    return {
        "model": name,
        "depth": depth,
        "batch": RECIPE.micro_batch_size,
        "length": RECIPE.max_length,
        "rank": LORA.rank,
        "on_gpu": device.type == "cuda",
        "steps": steps,
        "peak_bytes": at_depth(steps, planned),
        "planned_bytes": planned,
    }


def at_depth(steps: list[dict[str, Any]], planned: int) -> int:
    """The peak with all layers: what was measured with the most, and what is planned for the rest."""
    last = steps[-1]
    return last["peak_bytes"] + planned - last["planned_bytes"]


def _steps(name: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Build the model, take a step that makes the optimizer's states, and measure the one after it."""
    _collect_garbage()
    torch.manual_seed(0)
    config = model_config(name, layers)
    before, allocated_before = _requested(device), _allocated(device)
    started = time.monotonic()
    model = random_model(config, device, f"{name}, {layers} layers")
    build_seconds = time.monotonic() - started
    requested, allocated = _requested(device) - before, _allocated(device) - allocated_before
    optimizer = make_optimizer(model, RECIPE)
    adapters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(config.vocab_size, (RECIPE.micro_batch_size, RECIPE.max_length))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def step(number: int) -> float:
        return train_step(model, optimizer, adapters, [batch], RECIPE, number)["loss"]

    with module_modes(model, training=True), recomputing(model):
        step(0)
        started = time.monotonic()
        loss, peak = _measured(lambda: step(1), model, device)
    step_seconds = time.monotonic() - started
    return {
        "layers": layers,
        "loss": loss,
        "static_bytes": static_bytes(model),
        "requested_bytes": requested,
        "allocated_bytes": allocated,
        "optimizer_bytes": optimizer.state_bytes,
        "peak_bytes": peak + optimizer.state_bytes,
        "planned_bytes": plan_memory(config, LORA, RECIPE).total,
        "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "build_seconds": round(build_seconds, 1),
        "step_seconds": round(step_seconds, 1),
    }


def _collect_garbage() -> None:
    """An earlier model that is freed while this one is built would be taken off its bytes."""
    gc.collect()
    torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _requested(device: torch.device) -> int:
    """Bytes of the tensors that are on a GPU; 0 on a CPU, and before torch has been on the GPU.

    It is less than what torch has allocated for them, up to 1 MiB a tensor.
    """
    stats = torch.cuda.memory_stats(device) if device.type == "cuda" else {}
    return stats["requested_bytes.all.current"] if stats else 0


def random_model(config: Any, device: torch.device, what: str = "model") -> nn.Module:
    """A quantized model with random weights, each made, quantized and dropped by itself."""
    model = skeleton(config, torch.bfloat16)
    quantize_model(model, LORA)
    start_adapters(model, device)
    layers = [module for module in model.modules() if isinstance(module, QLoRALinear)]
    for layer in Progress(layers, f"random weights of {what}"):
        size = (layer.out_features, layer.in_features)
        weight = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(std=0.02)
        layer.weight = quantize_4bit(weight, LORA.format, LORA.blocksize, LORA.double_quant)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:  # a norm's weight has one dimension, an embedding's two
                values = torch.ones_like(parameter, device=device)
                values = values if values.dim() == 1 else values.normal_(std=0.02)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    return model.to(device)


def _measured(
    step: Callable[[], float], model: nn.Module, device: torch.device
) -> tuple[float, int]:
    """The step's loss, and the most bytes that there were at once, but for the optimizer's states.

    On a GPU by torch's allocator, which does not know the states, as they are in unified memory. On a
    CPU the model's, and the tensors that come and go.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        loss = step()
        torch.cuda.synchronize(device)
        return loss, torch.cuda.max_memory_allocated(device)
    with AllocationTrace("cpu") as trace:
        trace.exclude(*model.parameters(), *model.buffers())
        loss = step()
    return loss, sum(static_bytes(model).values()) + sum(trace.peak().values())
