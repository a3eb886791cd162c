"""All cases that a machine can run."""

from __future__ import annotations

import torch

from benchmarks.harness import Case, clock_for
from benchmarks.kernel_cases import kernel_cases
from benchmarks.step_cases import step_cases

GROUPS = {
    "quantize": "a tensor to NF4 with double quantization",
    "dequantize": "the same back to a dense tensor",
    "forward": "a linear layer without adapter, no gradients",
    "layer": "a linear layer with adapter, forward and all gradients",
    "step": "a fine-tuning step of SmolLM2-135M",
}


def all_cases(device: torch.device, groups: list[str], quick: bool) -> list[Case]:
    """The cases of `groups` on a device, in the data types that are of use there."""
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cpu" else [torch.bfloat16]
    if not has_fast_bf16(device):
        dtypes.remove(torch.bfloat16)
    cases = []
    if set(groups) - {"step"}:
        cases += kernel_cases(device, dtypes, quick)
    if "step" in groups:
        cases += step_cases(device, dtypes[:1] if quick else dtypes, quick)
    return [case for case in cases if case.group in groups]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a product in bf16 is quicker than in fp32. On a CPU without instructions for it, it is far slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, device=device, dtype=dtype).split(256)
        clock = clock_for(device)
        seconds[dtype] = min(clock(lambda a=a, b=b: a @ b.mT) for _ in range(4))
    return seconds[torch.bfloat16] < seconds[torch.float32]
