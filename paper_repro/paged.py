"""Paged optimizers (QLoRA, section 3): the same results at the same speed, and room on the GPU when it is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from qlora import PagedAdamW, QLoRAConfig, quantize_model, shapes
from qlora.fit import GIB, RESERVE
from qlora.memory import plan_memory
from qlora.recipe import TrainConfig
from qlora.testing import relative_rmse

MODEL, CPU_LAYERS, RANK = "llama-7b", 1, 64
STEPS, SEED, ROUNDS = 10, 0, 30
MOST_ERROR, MOST_TIME = 2.0, 0.05
RECIPE = TrainConfig()
ADAM = {
    "lr": RECIPE.learning_rate,
    "betas": (RECIPE.beta1, RECIPE.beta2),
    "eps": RECIPE.epsilon,
    "weight_decay": RECIPE.weight_decay,
}
"""Guanaco's."""
LARGE, CARD = "llama-65b", 48


def run(lab: Lab) -> Result:
    layers = None if lab.device.type == "cuda" else CPU_LAYERS
    settings = {"shape": list(shapes.LLAMA[MODEL]), "layers": layers, "rank": RANK, "steps": STEPS}
    measured = lab.measure("paged", settings, lambda: _measure(layers, lab.device))
    settings = {"shape": list(shapes.LLAMA[LARGE])}
    return {**measured, "large": lab.measure("paged-65b", settings, _large), "seeds": [SEED]}


def _measure(layers: int | None, device: torch.device) -> dict[str, Any]:
    sizes = adapter_shapes(layers)
    start = list(_normal(sizes, SEED, device))
    paged, regular = _Trained(start), _Trained(start)
    ours, own = (
        PagedAdamW(paged.parameters, **ADAM),
        PagedAdamW(regular.parameters, **ADAM, paged=False),
    )
    torchs, exact = _Trained(start), _Trained([tensor.double() for tensor in start])
    others = [torch.optim.AdamW(each.parameters, **ADAM) for each in (torchs, exact)]
    for step in tqdm(range(STEPS), desc="steps of paged and of regular AdamW", unit="step"):
        gradients = list(_normal(sizes, SEED + 1 + step, device))
        for each, optimizer in zip(
            (paged, regular, torchs, exact), (ours, own, *others), strict=True
        ):
            each.take_gradients(gradients)
            optimizer.step()
        ours.evict()
    identical = all(map(torch.equal, paged.parameters, regular.parameters))
    errors = {"ours": paged.error(start, exact), "torch": torchs.error(start, exact)}
    del torchs, exact, others
    return {
        "parameters": sum(tensor.numel() for tensor in start),
        "state_bytes": ours.state_bytes,
        "identical": identical,
        "errors": errors,
        "gpu": _on_gpu(ours, own) if device.type == "cuda" else None,
    }


def adapter_shapes(layers: int | None) -> list[torch.Size]:
    """Of LoRA on all linear layers of the model, or of so many of its blocks."""
    model = shapes.meta_model(shapes.model_config(MODEL, layers), torch.bfloat16)
    quantize_model(model, QLoRAConfig(rank=RANK))
    return [parameter.shape for parameter in model.parameters() if parameter.requires_grad]


def _normal(sizes: list[torch.Size], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Random tensors, the same on each device."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        yield (0.02 * torch.randn(size, generator=generator)).to(device)


class _Trained:
    """Parameters of one optimizer, of the dtype of their first values."""

    def __init__(self, start: list[Tensor]) -> None:
        self.parameters = [nn.Parameter(tensor.clone()) for tensor in start]

    def take_gradients(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.dtype)

    def error(self, start: list[Tensor], exact: _Trained) -> float:
        """Relative RMSE of all that the steps have changed."""
        changes = (
            torch.cat(
                [
                    (p.detach().double() - s).flatten()
                    for p, s in zip(e.parameters, start, strict=True)
                ]
            )
            for e in (self, exact)
        )
        return relative_rmse(*changes)


def _on_gpu(ours: PagedAdamW, own: PagedAdamW) -> dict[str, Any]:
    """Seconds of steps, taken in turns, and whether evicted states make room."""
    seconds: dict[str, list[float]] = {"paged": [], "regular": []}
    ours.prefetch()
    for _ in range(ROUNDS):
        for name, optimizer in (("paged", ours), ("regular", own)):
            torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": seconds, "makes_room": _makes_room(ours)}


def _makes_room(optimizer: PagedAdamW) -> bool:
    """Whether torch gets half of the evicted states' bytes beyond what the driver counts as free.

    Half, as the driver never hands out the last of it; and it counts emptied pages as taken until somebody
    allocates, so there is no free memory to be read.
    """
    optimizer.evict()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    wanted = torch.cuda.mem_get_info()[0] + optimizer.state_bytes // 2
    try:
        torch.empty(wanted, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


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


def _slower(result: Result) -> float:
    """Median of the rounds' ratios, less one."""
    seconds = result["gpu"]["seconds"]
    return median(p / r for p, r in zip(seconds["paged"], seconds["regular"], strict=True)) - 1


def _spare(result: Result) -> int:
    """Bytes that the card has to spare; below 0 it is too small."""
    return CARD * GIB - RESERVE - result["large"]["total"]


_NO_GPU = "needs a GPU: `python -m paper_repro paged` on one"

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
    ),
    Claim(
        statement="A step with paged states takes as long as one with regular states, where there is room",
        paper="the same speed",
        criterion=f"median of the rounds' ratios at most {MOST_TIME:.0%} above 1",
        passes=lambda r: _slower(r) <= MOST_TIME if r["gpu"] else None,
        measured=lambda r: f"{_slower(r):+.1%}" if r["gpu"] else _NO_GPU,
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
    "paged", "Paged optimizers", (0.4, 0.4), run, CLAIMS, section, lessons=lessons
)
