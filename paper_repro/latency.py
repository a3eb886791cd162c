"""LoRA's table 1: merged LoRA is as fast as the base, serial adapters are slower, above all at batch 1."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch

from paper_repro.harness import draw
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.room import where_it_fits
from paper_repro.harness.stats import Interval, bootstrap_median
from paper_repro.measures import forward_times, gpt2
from paper_repro.measures.gpt2 import ADAPTER_H, ADAPTER_L, BASE, MERGED, UNMERGED

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
CPU_ROUNDS, GPU_ROUNDS = (6, 20), 100  # the paper's are 100; on a CPU of a quick and of a full run
MOST_MERGED, LEAST_SERIAL, SAME = 0.02, 0.05, 1e-5


def run(lab: Lab) -> Result:
    points = _on_gpu(lab) if lab.device.type == "cuda" else {}
    on_gpu = JUDGED in points
    if not on_gpu:  # a core takes ten minutes for 16/256, and most of an hour for 32/512
        points = {JUDGED: _point(lab, JUDGED, lab.choose(*CPU_ROUNDS), torch.device("cpu"))}
    return {"on_gpu": on_gpu, "seeds": [gpt2.SEED], "points": points}


def _on_gpu(lab: Lab) -> dict[str, Any]:
    """The points for which the GPU has room."""
    found = {
        name: where_it_fits(
            f"GPT-2 medium at {name}", lambda name=name: _point(lab, name, GPU_ROUNDS, lab.device)
        )
        for name in POINTS
    }
    return {name: point for name, point in found.items() if point is not None}


def _point(lab: Lab, name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    batch, length, inner = POINTS[name]
    settings = {"point": [batch, length, inner], "rounds": rounds, "rank": RANK, **SHAPE}

    def function() -> dict[str, Any]:
        models = gpt2.contenders(**SHAPE, rank=RANK, inner=inner)
        return forward_times.measure(models, batch, length, rounds, device)

    what = f"latency-{name.replace('/', '-')}"
    return lab.measure(what, {**settings, "on": device.type}, function, (gpt2, forward_times))


def slower(point: dict[str, Any], name: str) -> Interval:
    """The share by which a model takes longer than the base in the same round: the rounds' median."""
    pairs = zip(point["seconds"][name], point["seconds"][BASE], strict=True)
    return bootstrap_median([own / base - 1 for own, base in pairs])


def _slower(result: Result, name: str) -> Interval:
    return slower(result["points"][JUDGED], name)


def _paper(point: str, name: str) -> float | None:
    """The paper's ms: of merged LoRA the same as of the base; not measured of LoRA that is not merged."""
    return PAPER[point].get(BASE if name == MERGED else name)


def _paper_slower(point: str, name: str) -> str:
    theirs = _paper(point, name)
    return "-" if theirs is None or name == BASE else f"{theirs / PAPER[point][BASE] - 1:+.1%}"


_WHERE = f"GPT-2 medium's shape, batch {POINTS[JUDGED][0]}, length {POINTS[JUDGED][1]}"

CLAIMS = (
    Claim(
        statement=f"LoRA, Table 1: merged, LoRA is as fast as the base ({_WHERE})",
        paper="19.8 ms both",
        criterion=f"median of the rounds' ratios within {MOST_MERGED:.0%}",
        passes=lambda r: abs(_slower(r, MERGED).mean) <= MOST_MERGED,
        measured=lambda r: _slower(r, MERGED).percent(),
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
        paper=f"AdapterL {_paper_slower(JUDGED, ADAPTER_L)}, AdapterH {_paper_slower(JUDGED, ADAPTER_H)}",
        criterion=f"medians of both at least {LEAST_SERIAL:.0%} above the base",
        passes=lambda r: (
            min(_slower(r, name).mean for name in (ADAPTER_L, ADAPTER_H)) >= LEAST_SERIAL
        ),
        measured=lambda r: ", ".join(
            f"{name} {_slower(r, name).percent()}" for name in (ADAPTER_L, ADAPTER_H)
        ),
        trend=True,
    ),
)


def section(result: Result) -> str:
    rows = []
    for name, point in result["points"].items():
        for model, seconds in point["seconds"].items():
            over = "-" if model == BASE else slower(point, model).percent()
            paper = _paper(name, model)
            rows.append(
                (
                    f"{name}, {model}",
                    f"{point['added'][model] / 1e6:.2f}M",
                    f"{1000 * median(seconds):,.1f}",
                    over,
                    "-" if paper is None else f"{paper:,}",
                    _paper_slower(name, model),
                )
            )
    header = ["batch/length", "added", "ms", "over base [95 %]", "paper, ms", "paper, over base"]
    missing = ", ".join(name for name in POINTS if name not in result["points"])
    how = "one thread, the time that it had a core"
    why = "minutes for each pass on a CPU"
    if result["on_gpu"]:
        how, why = "CUDA events", "too large for this GPU"
    return (
        f"All {SHAPE['layers']} layers of GPT-2 medium's shape with random weights, fp32, output layer included. The models take "
        "turns in every round, and what is compared are their times in the same round: "
        f"{len(result['points'][JUDGED]['seconds'][BASE])} of {JUDGED}; {how}. The paper measured on an RTX 8000.\n\n"
        + table(header, rows)
        + (f"\n\nNot run here: {missing} ({why})." if missing else "")
    )


def lessons(result: Result) -> list[str]:
    point, own = result["points"][JUDGED], _slower(result, UNMERGED)
    lines = [
        f"LoRA that is not merged takes {own.mean:+.1%} at batch 1: the price of one base for several tasks, "
        "which the paper does not measure."
    ]
    if not result["on_gpu"]:
        low, high = (_slower(result, name).mean for name in (ADAPTER_L, ADAPTER_H))
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
            found = _slower(result, name).scaled(100)
            label = "here, 95 % interval" if row == 0 else None
            axes.hlines(row, found.low, found.high, color=draw.ORANGE, linewidth=2)
            axes.scatter(found.mean, row, 36, draw.ORANGE, label=label, zorder=3)
            if paper := _paper(JUDGED, name):
                theirs = 100 * (paper / PAPER[JUDGED][BASE] - 1)
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
    (0.8, 2.3),
    run,
    CLAIMS,
    section,
    plots,
    lessons=lessons,
)
