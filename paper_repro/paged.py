"""Paged optimizers (QLoRA, section 3): the same results at the same speed, and room on the GPU when it is needed."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from paper_repro.harness.experiment import ARITHMETIC, OTHER, Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.room import where_it_fits
from paper_repro.harness.stats import Interval, bootstrap_median
from paper_repro.measures import paged_steps
from qlora import QLoRAConfig, quantize_model, shapes
from qlora.fit import GIB, RESERVE
from qlora.memory import plan_memory
from qlora.paged import state_bytes
from qlora.recipe import TrainConfig

MODEL, CPU_LAYERS, RANK = "llama-7b", 1, 64
STEPS, ROUNDS = 10, 30
MOST_ERROR, MOST_TIME = 2.0, 0.05
LARGE, CARD = "llama-65b", 48


def run(lab: Lab) -> Result:
    measured = None
    if lab.device.type == "cuda":
        measured = where_it_fits("The adapters of all layers", lambda: _measured(lab, None))
    if measured is None:
        measured = _measured(lab, CPU_LAYERS)
    settings = {"shape": list(shapes.LLAMA[LARGE])}
    return {
        **measured,
        "large": lab.measure("paged-65b", settings, _large),
        "seeds": [paged_steps.SEED],
    }


def _measured(lab: Lab, layers: int | None) -> dict[str, Any]:
    """All layers on the GPU, or some on the CPU."""
    device = torch.device("cpu") if layers else lab.device
    settings = {"shape": list(shapes.LLAMA[MODEL]), "layers": layers, "rank": RANK, "steps": STEPS}
    return lab.measure("paged", settings, lambda: _measure(layers, device), (paged_steps,))


def _measure(layers: int | None, device: torch.device) -> dict[str, Any]:
    sizes = adapter_shapes(layers)
    numels = [size.numel() for size in sizes]
    return {
        "parameters": sum(numels),
        "state_bytes": state_bytes(numels, bits=32),
        **paged_steps.compare(sizes, STEPS, device),
        "gpu": paged_steps.on_gpu(sizes, ROUNDS, device) if device.type == "cuda" else None,
    }


def adapter_shapes(layers: int | None) -> list[torch.Size]:
    """Of LoRA on all linear layers of the model, or of so many of its blocks."""
    model = shapes.meta_model(shapes.model_config(MODEL, layers), torch.bfloat16)
    quantize_model(model, QLoRAConfig(rank=RANK))
    return [parameter.shape for parameter in model.parameters() if parameter.requires_grad]


def _large() -> dict[str, int]:
    """Planned bytes of a step of 65B with a batch of 16 at once, and of one example at a time."""
    at_once, accumulated = (
        plan_memory(
            shapes.model_config(LARGE),
            QLoRAConfig(rank=RANK, adapter_dtype="bfloat16"),
            TrainConfig(micro_batch_size=size, gradient_accumulation_steps=16 // size),
        )
        for size in (16, 1)
    )
    return {
        "total": at_once.total,
        "optimizer": at_once.optimizer,
        "accumulated": accumulated.total,
    }


def _error(result: Result) -> float:
    return result["errors"]["ours"] / result["errors"]["torch"]


def _slower(result: Result) -> Interval:
    """The share by which a paged step takes longer than a regular one in the same round: the rounds' median."""
    seconds = result["gpu"]["seconds"]
    pairs = zip(seconds["paged"], seconds["regular"], strict=True)
    return bootstrap_median([paged / regular - 1 for paged, regular in pairs])


def _spare(result: Result) -> int:
    """Bytes that the card has to spare; below 0 it is too small."""
    return CARD * GIB - RESERVE - result["large"]["total"]


_NO_GPU = "needs a GPU with room for all adapters: `python -m paper_repro paged` on one"

CLAIMS = (
    Claim(
        statement="Paged states change no result: PagedAdamW with them and without, evicted after each step",
        paper="no figures",
        criterion=f"on a GPU, parameters equal to the bit after {STEPS} steps",
        passes=lambda r: r["identical"] if r["gpu"] else None,
        measured=lambda r: (
            ("identical" if r["identical"] else "they differ")
            if r["gpu"]
            else f"{_NO_GPU}; on a CPU there is no paging, the same code in plain memory is "
            + ("identical" if r["identical"] else "different")
        ),
    ),
    Claim(
        statement="It is AdamW",
        paper="regular AdamW",
        criterion=f"what {STEPS} steps change is off from AdamW in fp64 by at most {MOST_ERROR:g} times what "
        "torch's AdamW in fp32 is off",
        passes=lambda r: _error(r) <= MOST_ERROR,
        measured=lambda r: (
            f"{r['errors']['ours']:.1e} against torch's {r['errors']['torch']:.1e}: {_error(r):.2f} times"
        ),
        kind=OTHER,
    ),
    Claim(
        statement="A step with paged states takes as long as one with regular states, where there is room",
        paper="the same speed",
        criterion=f"median of the rounds' ratios at most {MOST_TIME:.0%} above 1",
        passes=lambda r: _slower(r).mean <= MOST_TIME if r["gpu"] else None,
        measured=lambda r: _slower(r).percent() if r["gpu"] else _NO_GPU,
    ),
    Claim(
        statement="Evicted states leave their room on the GPU to others",
        paper="evicted to CPU RAM when the GPU runs out of memory",
        criterion="torch gets at least half of their bytes beyond what was free",
        passes=lambda r: r["gpu"]["makes_room"] if r["gpu"] else None,
        measured=lambda r: (
            ("it does" if r["gpu"]["makes_room"] else "out of memory") if r["gpu"] else _NO_GPU
        ),
    ),
    Claim(
        statement=f"65B with a batch of 16 at once needs it on {CARD} GB (planned; its speed needs the weights)",
        paper="trains there, at the speed of regular optimizers; no figures",
        criterion="none: the paper does not say whether the batch went through the model at once",
        passes=None,
        measured=lambda r: (
            f"{r['large']['total'] / GIB:.2f} GiB, of which {r['large']['optimizer'] / GIB:.2f} can be paged out: "
            f"{(_spare(r) + r['large']['optimizer']) / GIB:+.2f} GiB to spare, with {RESERVE / GIB:g} for CUDA"
        ),
        kind=ARITHMETIC,
    ),
)


def section(result: Result) -> str:
    rows = [
        ("parameters", f"{result['parameters']:,}"),
        ("bytes of states", f"{result['state_bytes']:,}"),
        ("paged and regular equal to the bit", "yes" if result["identical"] else "no"),
        ("off from fp64, PagedAdamW", f"{result['errors']['ours']:.2e}"),
        ("off from fp64, torch.optim.AdamW", f"{result['errors']['torch']:.2e}"),
    ]
    if result["gpu"]:
        for name, seconds in result["gpu"]["seconds"].items():
            rows.append((f"a step, {name}, ms", f"{1000 * median(seconds):.3f}"))
    where = (
        "all layers, on a GPU"
        if result["gpu"]
        else f"{CPU_LAYERS} of {shapes.LLAMA[MODEL][1]} layers, on a CPU: there `PagedAdamW` has its states in plain "
        "memory, and nothing can be said of paging itself"
    )
    return (
        f"The adapters of LLaMA-7B (r = {RANK} on all linear layers; {where}) in fp32, random values, {STEPS} steps "
        "with random gradients by Guanaco's settings. *Off* is the relative RMSE of what the steps have changed.\n\n"
        + table(["", ""], rows)
    )


def lessons(result: Result) -> list[str]:
    large = result["large"]
    return [
        f"It is the batch of 16 at once that asks for paging at 65B: planned {large['total'] / GIB:.1f} GiB, and "
        f"{large['accumulated'] / GIB:.1f} one example at a time, which fits a card of {CARD} GB as it is."
    ]


EXPERIMENT = Experiment(
    "paged", "Paged optimizers", (0.1, 0.1), run, CLAIMS, section, lessons=lessons
)
