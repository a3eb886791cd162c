"""Figure 6 and section 3: memory of a training step, planned and measured, beside the paper's."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from paper_repro import draw, lora_inputs, one_step
from paper_repro.experiment import Claim, Experiment, Result, table
from paper_repro.lab import OUT, Lab, code_digest, library_digest, provenance
from qlora import files, shapes
from qlora import memory as planner

MIB, GIB = 2**20, 2**30

# Figure 6 in MB, which are 2^20 bytes: model, adapters, their gradient, optimizer, and the input gradient as read
# from the height of its bar; the printed total in GB.
FIGURE6 = {
    "7b": (5046, 288, 288, 1152, 105, 6.9),
    "13b": (8476, 450, 450, 1800, 104, 11.3),
    "33b": (19302, 877.5, 877.5, 3510, 150, 24.7),
    "65b": (37074, 1440, 1440, 5760, 140, 45.0),
}
PARTS = ("model", "adapters", "gradients", "optimizer", "activations")
LIMITS = {"65b": 48 * 10**9, "33b": 24 * GIB}
"""Bytes of the cards that the paper names: 48 GB in units of 10^9, the stricter reading; cards of 24 GB have 24 GiB."""


def run(lab: Lab) -> Result:
    settings = {"figure": FIGURE6}
    planned = lab.measure("memory", settings, _plan, (lora_inputs, one_step))
    return {**planned, "runs": _runs(OUT)}


def _plan() -> dict[str, Any]:
    models = {size: shapes.model_config(f"llama-{size}") for size in FIGURE6}
    single = replace(one_step.LORA, adapter_dtype="float32")
    recipes = {
        steps: replace(one_step.RECIPE, gradient_accumulation_steps=steps) for steps in (1, 16)
    }
    return {
        "models": {size: _planned(config) for size, config in models.items()},
        "65b in fp32": [
            planner.plan_memory(models["65b"], single, r).total for r in recipes.values()
        ],
        "inputs": {
            name: lora_inputs.at_once(models["7b"], checkpointing)
            for name, checkpointing in (("without", False), ("with", True))
        },
    }


def _planned(config: Any) -> dict[str, int]:
    plan = planner.plan_memory(config, one_step.LORA, one_step.RECIPE)
    dense = shapes.meta_model(config, torch.bfloat16)
    return {**asdict(plan), "parameters": sum(p.numel() for p in dense.parameters())}


def take_step(size: str) -> Path:
    """Run a step of a model, "7b" to "65b", and keep what it took where `run` finds it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = one_step.run(f"llama-{size}", device)
    origin = provenance()
    if device.type == "cuda":
        origin["device"] = torch.cuda.get_device_name(device)
    path = OUT / f"memory-run-{size}-{device.type}.json"
    files.write_json(path, result | {"measured_on": origin, "code": _code()})
    return path


def _code() -> str:
    """A digest of what determines a step's figures."""
    return library_digest() + code_digest([Path(one_step.__file__)])


def _runs(folder: Path) -> dict[str, Any]:
    """The step that was run of each model, on a GPU if there is one."""
    found = {}
    for size in FIGURE6:
        paths = (folder / f"memory-run-{size}-{kind}.json" for kind in ("cuda", "cpu"))
        if path := next((path for path in paths if path.is_file()), None):
            run = files.read_json(path)
            found[size] = run | {"is_stale": run["code"] != _code()}
    return found


def _total(planned: dict[str, int]) -> int:
    return sum(bytes for part, bytes in planned.items() if part != "parameters")


def _parts(planned: dict[str, int]) -> tuple[int, ...]:
    """Bytes of the figure's parts; scales and embeddings are of the model."""
    model = planned["weights"] + planned["scales"] + planned["dense"]
    kept = planned["activations"] + planned["temporaries"]
    return model, planned["adapters"], planned["gradients"], planned["optimizer"], kept


def _gigabytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size.upper()} {bytes / 1e9:.2f} GB" for size, bytes in sizes.items())


def _planned_limits(result: Result) -> dict[str, int]:
    return {size: _total(result["models"][size]) for size in LIMITS}


def _gpu_runs(result: Result) -> dict[str, Any]:
    """Whole models on a GPU, with the code of this report."""
    return {size: r for size, r in result["runs"].items() if r["on_gpu"] and not r["is_stale"]}


def _gpu_limits(result: Result) -> dict[str, int]:
    return {size: r["peak_bytes"] for size, r in _gpu_runs(result).items() if size in LIMITS}


def _within(peaks: dict[str, int]) -> bool | None:
    """Whether all are below their limits; None if one has not run and none is above."""
    if any(peak >= LIMITS[size] for size, peak in peaks.items()):
        return False
    return True if peaks.keys() == LIMITS.keys() else None


def _gpu_limits_in_words(result: Result) -> str:
    peaks = _gpu_limits(result)
    missing = [size for size in LIMITS if size not in peaks]
    commands = ", ".join(f"`memory --model {size} --run`" for size in missing)
    words = [_gigabytes(peaks)] if peaks else []
    return "; ".join(words + ([f"needs a GPU: {commands}"] if missing else []))


def _deviations(result: Result) -> list[float]:
    """Of each step that was run on a GPU, from what was planned for it."""
    steps = [step for run in _gpu_runs(result).values() for step in run["steps"]]
    return [step["peak_bytes"] / step["planned_bytes"] - 1 for step in steps]


def _ratio(result: Result) -> float:
    return result["inputs"]["without"] / result["inputs"]["with"]


_STEP = "batch 1, length 512, r = 64 on all layers, bf16 adapters, checkpointing"

CLAIMS = (
    Claim(
        statement=f"65B trains on a card of 48 GB, 33B on one of 24 GB, by the planner ({_STEP})",
        paper="< 48 GB; Guanaco 33B on 24 GB",
        criterion="planned peak of a step below 48e9 bytes and below 24 GiB",
        passes=lambda r: _within(_planned_limits(r)),
        measured=lambda r: _gigabytes(_planned_limits(r)),
    ),
    Claim(
        statement="The same, measured: a full step on a GPU",
        paper="< 48 GB; 24 GB",
        criterion="torch's peak and the paged states together below 48e9 bytes and below 24 GiB",
        passes=lambda r: _within(_gpu_limits(r)),
        measured=_gpu_limits_in_words,
    ),
    Claim(
        statement="The planner says what a step takes",
        paper="-",
        criterion="torch's peak on a GPU, and the paged states, within 5 % of what was planned",
        passes=lambda r: all(abs(d) <= 0.05 for d in _deviations(r)) if _deviations(r) else None,
        measured=lambda r: ", ".join(f"{d:+.1%}" for d in _deviations(r)) or "needs a GPU",
    ),
    Claim(
        statement="Training all of 65B in 16 bits takes more than 780 GB",
        paper="> 780 GB",
        criterion="12 bytes for each parameter of the model's shapes: 783.4 GB",
        passes=lambda r: round(12 * r["models"]["65b"]["parameters"] / 1e8) == 7834,
        measured=lambda r: f"{12 * r['models']['65b']['parameters'] / 1e9:.1f} GB",
    ),
    Claim(
        statement="Gradient checkpointing shrinks what LoRA's gradients need of the inputs (7B, batch 1)",
        paper="567 MB to 18 MB: 31.5 times less",
        criterion="at least 20 times less held at once, length 512",
        passes=lambda r: _ratio(r) >= 20,
        measured=lambda r: (
            f"{r['inputs']['without'] / MIB:.0f} MiB to {r['inputs']['with'] / MIB:.2f} MiB: {_ratio(r):.1f}"
        ),
    ),
)


def section(result: Result) -> str:
    rows = []
    for size, figure in FIGURE6.items():
        planned = result["models"][size]
        for part, theirs, ours in zip(PARTS, figure, _parts(planned), strict=False):
            rows.append((f"{size.upper()} {part}", f"{theirs:,}", f"{ours / MIB:,.0f}", "-"))
        measured = _measured(result["runs"].get(size))
        total = _total(planned)
        rows.append(
            (f"**{size.upper()} total**", f"{figure[-1]} GB", f"{total / MIB:,.0f}", measured)
        )
    header = ["Figure 6", "paper, MB", "planned, MiB", "measured, MiB"]
    return (
        f"A step with {_STEP}, of one micro-batch. *Planned* is what `qlora memory llama-65b --adapter-dtype "
        "bfloat16 --accumulation 1` says: the library's own objects on the meta device, and the tensors that a "
        "step makes there. The figure's MB are 2^20 bytes, its total in units of 1000 or 1024 MB, which it "
        "does not say; its input gradients are read from the heights of the bars. It adds up what a step needs "
        "at any time; ours is the fullest moment, here near the end of the backward pass, when nearly all "
        "gradients are there, most checkpoints are gone and one block is computed again.\n\n"
        + table(header, rows)
        + "\n\n"
        + _runs_in_words(result["runs"])
        + "\n\nWhat does not add up in the figure, and in the text around it:\n\n"
        + "\n".join(f"- {line}" for line in _errata(result))
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
        "(64 MiB planned) does not exist there.\n\n" + "\n".join(lines)
    )


def _step_in_words(step: dict[str, Any]) -> str:
    return (
        f"{step['layers']} layer{'s' * (step['layers'] > 1)} {step['peak_bytes'] / MIB:,.0f} MiB (planned "
        f"{step['planned_bytes'] / MIB:,.0f}; the process {step['resident_bytes'] / MIB:,.0f} at most), "
        f"{step['step_seconds']:g} s"
    )


def _errata(result: Result) -> list[str]:
    models = result["models"]
    without_dq = {size: _without_double_quant(models[size]) for size in FIGURE6}
    rest = " / ".join(
        f"{FIGURE6[size][0] - bytes / MIB:,.0f}" for size, bytes in without_dq.items()
    )
    adapters = " / ".join(f"{models[size]['adapters'] / MIB:,.1f}" for size in FIGURE6)
    labels = sum(FIGURE6["65b"][:4])
    return [
        "The model's bars fit NF4 *without* double quantization and a nearly constant overhead "
        f"({rest} MiB); with it, what is left over would grow with the model.",
        "Its adapters equal 64 x 18 d L x 2 bytes: a feed-forward layer of two matrices of width 4 d, which "
        f"LLaMA has not. The true ones take {adapters} MiB.",
        f"The 65B labels sum to {labels:,.0f} MB without the input gradient: 45.7 or 44.6 GB, by 1000 or 1024 "
        "MB, where 45.0 are printed.",
        '"18 MB ... more than all LoRA weights" cannot be: the weights take 26 MB by the same sentence.',
        "Adapters in 16 bits are not mentioned, and needed: in fp32 65B takes "
        + " GB in one micro-batch and ".join(
            f"{bytes / 1e9:.1f}" for bytes in result["65b in fp32"]
        )
        + " GB with gradients accumulated over 16, before what CUDA itself takes.",
    ]


def _without_double_quant(planned: dict[str, int]) -> float:
    """Bytes of the model with a fp32 scale for each 64 weights."""
    return planned["weights"] * (1 + 4 / 32) + planned["dense"]


def plots(result: Result, folder: Path) -> dict[str, Path]:
    bars = {
        size.upper(): {
            "paper": list(figure[:5]),
            "planned": [bytes / MIB for bytes in _parts(result["models"][size])],
        }
        for size, figure in FIGURE6.items()
    }
    path = draw.memory(bars, PARTS, folder / "memory.png")
    return {"Memory of a training step: the paper's Figure 6 and the planner": path}


EXPERIMENT = Experiment(
    "memory", "Figure 6: memory of a training step", 0.5, run, CLAIMS, section, plots
)
