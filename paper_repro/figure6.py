"""Figure 6 beside what is planned and measured: its table, its plot, and what in it does not add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_repro.harness import draw
from paper_repro.harness.experiment import Result, table

MIB = 2**20

# Figure 6 in MB, which are 2^20 bytes: model, adapters, their gradient, optimizer, and the input gradient as read
# from the height of its bar; the printed total in GB.
FIGURE6 = {
    "7b": (5046, 288, 288, 1152, 105, 6.9),
    "13b": (8476, 450, 450, 1800, 104, 11.3),
    "33b": (19302, 877.5, 877.5, 3510, 150, 24.7),
    "65b": (37074, 1440, 1440, 5760, 140, 45.0),
}
PARTS = ("model", "adapters", "gradients", "optimizer", "activations")
STEP = "batch 1, length 512, r = 64 on all layers, bf16 adapters, checkpointing"


def total(planned: dict[str, int]) -> int:
    """Bytes of a plan of `memory`, which also has the number of parameters."""
    return sum(bytes for part, bytes in planned.items() if part != "parameters")


def parts(planned: dict[str, int]) -> tuple[int, ...]:
    """Bytes of PARTS; scales and embeddings are of the model."""
    model = planned["weights"] + planned["scales"] + planned["dense"]
    kept = planned["activations"] + planned["temporaries"]
    return model, planned["adapters"], planned["gradients"], planned["optimizer"], kept


def section(result: Result) -> str:
    rows = []
    for size, figure in FIGURE6.items():
        planned = result["models"][size]
        for part, theirs, ours in zip(PARTS, figure, parts(planned), strict=False):
            rows.append((f"{size.upper()} {part}", f"{theirs:,}", f"{ours / MIB:,.0f}", "-"))
        measured = _measured(result["runs"].get(size))
        whole = f"{total(planned) / MIB:,.0f}"
        rows.append((f"**{size.upper()} total**", f"{figure[-1]} GB", whole, measured))
    header = ["Figure 6", "paper, MB", "planned, MiB", "measured, MiB"]
    return (
        f"A step with {STEP}, of one micro-batch. *Planned* is what `qlora memory llama-65b --adapter-dtype "
        "bfloat16 --accumulation 1` says: the library's own objects on the meta device, and the tensors that a "
        "step makes there. The figure's MB are 2^20 bytes, its total in units of 1000 or 1024 MB, which it "
        "does not say; its input gradients are read from the heights of the bars. It adds up what a step needs "
        "at any time; ours is the fullest moment, here near the end of the backward pass, when nearly all "
        "gradients are there, most checkpoints are gone and one block is computed again.\n\n"
        f"{table(header, rows)}\n\n{_runs_in_words(result['runs'])}"
    )


def _measured(run: dict[str, Any] | None) -> str:
    if run is None:
        return "not run"
    if run["on_gpu"]:
        return f"{run['peak_bytes'] / MIB:,.0f}"
    return f"{run['peak_bytes'] / MIB:,.0f} (traced on {run['steps'][-1]['layers']} layers, extrapolated)"


def _runs_in_words(runs: dict[str, Any]) -> str:
    if not runs:
        return "No step was run: `python -m paper_repro memory --model 65b --run` runs one."
    lines = []
    for size, run in runs.items():
        origin = f"{run['measured_on']['device']}, commit {run['measured_on']['commit']}"
        stale = ", with other code than this report's" if run["is_stale"] else ""
        steps = "; ".join(map(_step_in_words, run["steps"]))
        how = "" if run["on_gpu"] else f". The rest up to {run['depth']} layers is the planner's"
        lines.append(f"- {size.upper()}, {origin}{stale}: {steps}{how}.")
    return (
        "Real steps with random weights of the true width. On a CPU it is the bytes of all tensors alive that "
        "are counted, by the planner's own trace, without scratch memory inside operators; cuBLAS' "
        "(64 MiB planned) does not exist there. *The process* is the most that it has ever held, whatever ran "
        "in it before.\n\n" + "\n".join(lines)
    )


def _step_in_words(step: dict[str, Any]) -> str:
    return (
        f"{step['layers']} layer{'s' * (step['layers'] > 1)} {step['peak_bytes'] / MIB:,.0f} MiB (planned "
        f"{step['planned_bytes'] / MIB:,.0f}; the process up to then {step['resident_bytes'] / MIB:,.0f}), "
        f"{step['step_seconds']:g} s"
    )


def errata(result: Result) -> list[str]:
    models = result["models"]
    rest = " / ".join(
        f"{FIGURE6[size][0] - _without_double_quant(models[size]) / MIB:,.0f}" for size in FIGURE6
    )
    adapters = " / ".join(f"{models[size]['adapters'] / MIB:,.1f}" for size in FIGURE6)
    labels = sum(FIGURE6["65b"][:4])
    return [
        "QLoRA, Figure 6: the model's bars fit NF4 *without* double quantization and a nearly constant overhead "
        f"({rest} MiB); with it, what is left over would grow with the model.",
        "QLoRA, Figure 6: its adapters equal 64 x 18 d L x 2 bytes: a feed-forward layer of two matrices of "
        f"width 4 d, which LLaMA has not. The true ones take {adapters} MiB.",
        f"QLoRA, Figure 6: the 65B labels sum to {labels:,.0f} MB without the input gradient, "
        f"{labels / 1000:.1f} GB by 1000 MB as in the other three totals, where {FIGURE6['65b'][-1]} are printed.",
        'QLoRA, section 3: "18 MB ... more than all LoRA weights" cannot be: the weights take 26 MB by the sentence '
        "before.",
    ]


def _without_double_quant(planned: dict[str, int]) -> float:
    """Bytes of the model with a fp32 scale for each 64 weights."""
    return planned["weights"] * (1 + 4 / 32) + planned["dense"]


def lessons(result: Result) -> list[str]:
    model, *trained, kept = (bytes / 1e9 for bytes in parts(result["models"]["65b"]))
    return [
        f"Of a step of 65B, r = 64 takes {sum(trained):.1f} GB (adapters, gradients, Adam's states) beside "
        f"{model:.1f} GB of weights, and activations {kept:.1f} GB: with the base in 4 bits and checkpointing it is "
        "the rank and the dtype of the adapters that decide whether a card suffices.",
        "With adapters in fp32, and not in bf16 as in equation 5, 65B takes "
        + " GB in one micro-batch and ".join(
            f"{bytes / 1e9:.1f}" for bytes in result["65b in fp32"]
        )
        + " GB with gradients accumulated over 16, before what CUDA itself takes.",
    ]


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "memory.svg"
    colors = (draw.BLUE, draw.ORANGE, "#e8b88a", draw.LIGHT, draw.GREY)
    with draw.figure(path, height=4.2) as axes:
        for place, (size, figure) in enumerate(FIGURE6.items()):
            ours = [bytes / MIB for bytes in parts(result["models"][size])]
            for offset, sizes in ((-0.21, figure[:5]), (0.21, ours)):
                bottom = 0.0
                for part, mib, color in zip(PARTS, sizes, colors, strict=True):
                    label = part if place == 0 and offset < 0 else None
                    axes.bar(place + offset, mib / 1024, 0.38, bottom, color=color, label=label)
                    bottom += mib / 1024
                over = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
                words = {"ha": "center", "color": draw.GREY, "bbox": over}
                axes.text(place + offset, bottom + 0.9, f"{bottom:.1f}", **words)
        for gibibytes in (24, 48):
            axes.axhline(gibibytes, color="black", linewidth=0.8, linestyle="--")
            axes.text(-0.48, gibibytes + 0.4, f"{gibibytes} GiB", color="black")
        names = [f"{size.upper()}\npaper | planned" for size in FIGURE6]
        axes.set_xticks(range(len(FIGURE6)), names)
        axes.set(ylabel="GiB", ylim=(0, 54))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 0.86))
    return {"Memory of a training step: the paper's Figure 6 and the planner": path}
