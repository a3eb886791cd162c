"""All cases that a machine can run."""

from __future__ import annotations

import torch

from benchmarks.ceilings import product_tflop_per_s
from benchmarks.decoder_cases import decoder_cases
from benchmarks.dora_cases import dora_cases
from benchmarks.harness import Case
from benchmarks.kernel_cases import kernel_cases
from benchmarks.layer_cases import layer_cases
from benchmarks.optimizer_cases import optimizer_cases
from benchmarks.step_cases import step_cases

GROUPS = {
    "quantize": "a tensor to NF4 with double quantization",
    "dequantize": "the same back to a dense tensor",
    "forward": "a linear layer without adapter, no gradients",
    "launch": "what the host spends on one such call, and on both passes of a small layer (GPU only)",
    "crossover": "the kernels between which the number of tokens decides, side by side (GPU only)",
    "layer": "a linear layer with adapter, forward and all gradients",
    "decoder": "a decoder layer of Llama 3 8B's shape, both passes (GPU, or tiny with --quick)",
    "adamw": "a step of the optimizer for the adapters of a model",
    "step": "a fine-tuning step of SmolLM2-135M",
    "dora": "the same and the decoder layer with DoRA, beside LoRA",
}


def all_cases(
    device: torch.device, dtypes: list[torch.dtype], groups: list[str], quick: bool
) -> list[Case]:
    """The cases of `groups` on a device, in these data types."""
    cases = kernel_cases(device, dtypes, quick) + layer_cases(device, dtypes, quick)
    cases += decoder_cases(device, dtypes, quick)
    cases += optimizer_cases(device, quick)
    cases += step_cases(device, dtypes[:1] if quick else dtypes, quick)
    cases += dora_cases(device, dtypes, quick)
    return [case for case in cases if case.group in groups]


def useful_dtypes(device: torch.device) -> list[torch.dtype]:
    """bf16 on a GPU; fp32 on a CPU, and bf16 where its products are quicker than those in fp32.

    On a CPU without instructions for it they are far slower.
    """
    if device.type == "cuda":
        return [torch.bfloat16]
    speed = {
        dtype: product_tflop_per_s(device, dtype, 256) for dtype in (torch.float32, torch.bfloat16)
    }
    if speed[torch.bfloat16] < speed[torch.float32]:
        return [torch.float32]
    return list(speed)
