"""LoRA's table 1: merged LoRA is as fast as the base, serial adapters are slower, above all at batch 1."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from paper_repro.harness import draw
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.stats import DRAWS, SEED, Interval
from paper_repro.measures import gpt2
from paper_repro.measures.gpt2 import ADAPTER_H, ADAPTER_L, BASE, MERGED, UNMERGED
from qlora.testing import relative_rmse

SHAPE = {"layers": 24, "width": 1024, "heads": 16, "context": 1024}
"""GPT-2 medium."""
RANK = 4
# Batch / length: the bottlenecks' widths, which make 11M parameters or 0.5M; ms on an RTX 8000 in the paper.
INNER = {ADAPTER_L: 224, ADAPTER_H: 112}
POINTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "1/128": (1, 128, INNER),
    "16/256": (16, 256, INNER),
    "32/512": (32, 512, {ADAPTER_L: 8, ADAPTER_H: 4}),
}
PAPER = {
    "1/128": {BASE: 19.8, ADAPTER_L: 23.9, ADAPTER_H: 25.8},
    "16/256": {BASE: 338.0, ADAPTER_L: 354.8, ADAPTER_H: 366.3},
    "32/512": {BASE: 1449.4, ADAPTER_L: 1482.0, ADAPTER_H: 1492.2},
}
JUDGED = "1/128"
MOST_MERGED, LEAST_SERIAL, SAME = 0.02, 0.05, 1e-5


def run(lab: Lab) -> Result:
    rounds = _rounds(lab)
    return {
        "on_gpu": lab.device.type == "cuda",
        "seeds": [0],
        "points": {name: _point(lab, name, count) for name, count in rounds.items()},
    }


def _rounds(lab: Lab) -> dict[str, int]:
    """How often each point is measured; a core takes ten minutes for 16/256, and most of an hour for 32/512."""
    if lab.device.type == "cuda":
        return dict.fromkeys(POINTS, 100)
    return {"1/128": lab.choose(6, 20)}


def _point(lab: Lab, name: str, rounds: int) -> dict[str, Any]:
    batch, length, inner = POINTS[name]
    settings = {"point": [batch, length, inner], "rounds": rounds, "rank": RANK, **SHAPE}

    def function() -> dict[str, Any]:
        models = gpt2.contenders(**SHAPE, rank=RANK, inner=inner)
        return measure(models, batch, length, rounds, lab.device)

    return lab.measure(f"latency-{name.replace('/', '-')}", settings, function, (gpt2,))


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], batch: int, length: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a forward pass of each model, round by round: each takes its turn in each, and in each place.

    A round before them warms up; by its answers the merged model is compared to the one that is not.
    """
    torch.manual_seed(0)
    ids = torch.randint(models[BASE].config.vocab_size, (batch, length), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with _one_thread():
        warm = {
            name: model.to(device)(ids, use_cache=False).logits for name, model in models.items()
        }
        found = {
            "apart": relative_rmse(warm[MERGED], warm[UNMERGED]),
            "adapted": relative_rmse(warm[UNMERGED], warm[BASE]),
        }
        warm.clear()
        names = list(models)
        for turn in tqdm(range(rounds), desc=f"forward passes, {batch}/{length}", unit="round"):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(_seconds(models[name], ids))
    base = models[BASE]
    return {
        "seconds": seconds,
        "added": {name: gpt2.added_parameters(model, base) for name, model in models.items()},
        "base_parameters": sum(parameter.numel() for parameter in base.parameters()),
        "same_layout": gpt2.layout(models[MERGED]) == gpt2.layout(base),
        **found,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """The CPU's part on one thread: two would wait for each other wherever another job has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(model: nn.Module, ids: torch.Tensor) -> float:
    """Of a forward pass: by events on a GPU, else the time that the thread had a core."""
    if not ids.is_cuda:
        started = time.thread_time()
        model(ids, use_cache=False)
        return time.thread_time() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    model(ids, use_cache=False)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def ratio(point: dict[str, Any], name: str) -> Interval:
    """Median of a model's time over the base's in the same round, and its 95 % interval by bootstrap."""
    import numpy as np
    from scipy.stats import bootstrap

    pairs = zip(point["seconds"][name], point["seconds"][BASE], strict=True)
    ratios = np.array([own / base for own, base in pairs])
    if np.ptp(ratios) == 0:  # of which there is nothing to draw
        return Interval(*[float(ratios[0])] * 3)
    options = {"n_resamples": DRAWS, "method": "percentile", "vectorized": True}
    found = bootstrap((ratios,), np.median, **options, random_state=np.random.default_rng(SEED))
    low, high = found.confidence_interval
    return Interval(float(np.median(ratios)), float(low), float(high))


def _ratio(result: Result, name: str) -> Interval:
    return ratio(result["points"][JUDGED], name)


def _in_words(found: Interval) -> str:
    return f"{found.mean - 1:+.1%} [{found.low - 1:+.1%}, {found.high - 1:+.1%}]"


def _paper(point: str, name: str) -> str:
    ours = PAPER[point].get(name)
    return "-" if ours is None else f"{ours / PAPER[point][BASE] - 1:+.1%}"


_WHERE = f"GPT-2 medium's shape, batch {POINTS[JUDGED][0]}, length {POINTS[JUDGED][1]}"

CLAIMS = (
    Claim(
        statement=f"LoRA, Table 1: merged, LoRA is as fast as the base ({_WHERE})",
        paper="19.8 ms both",
        criterion=f"median of the rounds' ratios within {MOST_MERGED:.0%}",
        passes=lambda r: abs(_ratio(r, MERGED).mean - 1) <= MOST_MERGED,
        measured=lambda r: _in_words(_ratio(r, MERGED)),
    ),
    Claim(
        statement="LoRA, section 4.1: by construction, as what is merged computes just what the base does",
        paper="no additional latency",
        criterion="the same layers by class, shape and stride of each parameter as the base, and the answers of "
        f"LoRA not merged within {SAME:g} relative RMSE",
        passes=lambda r: all(p["same_layout"] and p["apart"] <= SAME for p in r["points"].values()),
        measured=lambda r: (
            ("the same" if r["points"][JUDGED]["same_layout"] else "other")
            + f" layers; answers apart by {r['points'][JUDGED]['apart']:.1e}"
        ),
    ),
    Claim(
        statement=f"LoRA, Table 1: serial adapters of 11M parameters are slower ({_WHERE})",
        paper=f"AdapterL {_paper(JUDGED, ADAPTER_L)}, AdapterH {_paper(JUDGED, ADAPTER_H)}",
        criterion=f"medians of both at least {LEAST_SERIAL:.0%} above the base",
        passes=lambda r: (
            min(_ratio(r, name).mean for name in (ADAPTER_L, ADAPTER_H)) >= 1 + LEAST_SERIAL
        ),
        measured=lambda r: ", ".join(
            f"{name} {_in_words(_ratio(r, name))}" for name in (ADAPTER_L, ADAPTER_H)
        ),
        trend=True,
    ),
)


def section(result: Result) -> str:
    rows = []
    for name, point in result["points"].items():
        for model, seconds in point["seconds"].items():
            middle = sorted(seconds)[len(seconds) // 2]
            over = "-" if model == BASE else _in_words(ratio(point, model))
            paper = PAPER[name][BASE] if model in (BASE, MERGED) else PAPER[name].get(model)
            rows.append(
                (
                    f"{name}, {model}",
                    f"{point['added'][model] / 1e6:.2f}M",
                    f"{1000 * middle:,.1f}",
                    over,
                    "-" if paper is None else f"{paper:,}",
                    _paper(name, model),
                )
            )
    header = ["batch/length", "added", "ms", "over base [95 %]", "paper, ms", "paper, over base"]
    missing = ", ".join(name for name in POINTS if name not in result["points"])
    how = "CUDA events" if result["on_gpu"] else "one thread, the time that it had a core"
    return (
        "All 24 layers of GPT-2 medium's shape with random weights, fp32, output layer included. The models take "
        "turns in every round, and what is compared are their times in the same round: "
        f"{len(result['points'][JUDGED]['seconds'][BASE])} of {JUDGED}; {how}. The paper measured on an RTX 8000.\n\n"
        + table(header, rows)
        + (f"\n\nNot run here: {missing} (minutes for each pass on a CPU)." if missing else "")
    )


def lessons(result: Result) -> list[str]:
    point, own = result["points"][JUDGED], _ratio(result, UNMERGED)
    lines = [
        f"LoRA that is not merged takes {own.mean - 1:+.1%} at batch 1: the price of one base for several tasks, "
        "which the paper does not measure."
    ]
    if not result["on_gpu"]:
        low, high = (_ratio(result, name).mean - 1 for name in (ADAPTER_L, ADAPTER_H))
        share = point["added"][ADAPTER_L] / point["base_parameters"]
        lines.append(
            f"On one core of a CPU, which always has enough to do, serial adapters cost {low:+.1%} and {high:+.1%}, "
            f"and are {share:.1%} of the parameters: what the paper finds at batch 1 is a matter of a device that "
            "waits for one small layer after the other."
        )
    return lines


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path, names = folder / "latency.svg", (MERGED, UNMERGED, ADAPTER_L, ADAPTER_H)
    with draw.figure(path, height=2.8) as axes:
        for row, name in enumerate(names):
            found = _ratio(result, name)
            low, high = 100 * (found.low - 1), 100 * (found.high - 1)
            label = "here, 95 % interval" if row == 0 else None
            axes.hlines(row, low, high, color=draw.ORANGE, linewidth=2)
            axes.scatter(100 * (found.mean - 1), row, 36, draw.ORANGE, label=label, zorder=3)
            if name != UNMERGED:
                theirs = 100 * (
                    PAPER[JUDGED].get(name, PAPER[JUDGED][BASE]) / PAPER[JUDGED][BASE] - 1
                )
                label = "the paper, RTX 8000" if row == 0 else None
                axes.scatter(theirs, row, 160, draw.GREY, marker="|", linewidth=2.5, label=label)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel=f"time over the base's, %, batch/length {JUDGED}", ylim=(-0.5, 3.5))
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper right")
    return {"What adapters add to the time of a forward pass": path}


EXPERIMENT = Experiment(
    "latency",
    "LoRA's Table 1: latency of merged LoRA and of serial adapters",
    (1, 14),
    run,
    CLAIMS,
    section,
    plots,
    lessons=lessons,
)
