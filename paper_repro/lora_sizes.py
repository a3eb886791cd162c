"""How many parameters LoRA trains, and what they take on disk and in memory (LoRA, sections 1, 4.2 and 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from paper_repro import lora_sizes_shown
from paper_repro.figure6 import FIGURE6, MIB
from paper_repro.harness.experiment import ARITHMETIC, OTHER, Claim, Experiment, Result
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, model
from paper_repro.measures import lora_shapes
from paper_repro.measures.lora_shapes import FULL_RANK, PAPER_PARAMETERS, RANKS, SHAPES
from qlora import shapes

GPT2, GPT3 = ("GPT-2 M", "GPT-2 L"), ("GPT-3, r 1", "GPT-3, r 8")
ENCODERS = ("RoBERTa base", "RoBERTa large", "DeBERTa XXL")
PRINTED_MB, PRINTED_SHARE = 26, 0.002  # QLoRA, section 3
CHECKPOINT_MB = 35  # as printed
LEAST_RATIO = 3
MOST_OVERHEAD = 0.05  # of a file over its tensors
PRINTED_TB = 1.2


def run(lab: Lab) -> Result:
    settings = {
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "llamas": {name: list(shape) for name, shape in shapes.LLAMA.items()},
    }
    counted = lab.measure("lora-sizes", settings, lora_shapes.count)
    folder = model.model_folder(lab.folder)
    settings = {"model": assets.MODEL_SHA256}
    files = lab.measure("lora-files", settings, lambda: lora_shapes.write(folder), (lora_shapes,))
    return {**counted, "files": files}


def _as_printed(result: Result, name: str) -> bool:
    """Whether a count is what LoRA's tables print, to the digits that they print."""
    printed = SHAPES[name].printed
    digits = len(printed.partition(".")[2])
    return round(result["counts"][name] / 1e6, digits) == float(printed)


def _counts(result: Result, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {result['counts'][name] / 1e6:.3f}M" for name in names)


def _times_smaller(result: Result) -> float:
    return result["checkpoint"]["model"] / result["checkpoint"]["adapter"]


def _ratios(result: Result) -> dict[str, float]:
    """How many times fewer bytes AdamW's step keeps with LoRA."""
    return {
        name: sum(kept["full"].values()) / sum(kept["lora"].values())
        for name, kept in result["training"].items()
    }


def _overheads(result: Result) -> list[float]:
    return [
        a["weights_bytes"] / (2 * a["parameters"]) - 1 for a in result["files"]["adapters"].values()
    ]


def _share_in_mb(result: Result) -> float:
    """The printed share of LLaMA-7B's linear weights, in MB of 16 bits each."""
    return PRINTED_SHARE * result["llama"]["linear"] * 2 / 1e6


def _searched(result: Result) -> Iterator[tuple[str, float]]:
    """MB in 16 bits of each setting in QLoRA's search, on LLaMA-7B."""
    for name, parameters in result["llama"]["of rank 1"].items():
        for rank in RANKS:
            yield f"{name}, r {rank}", 2 * rank * parameters / 1e6


def _nearest(result: Result) -> tuple[str, float]:
    return min(_searched(result), key=lambda setting: abs(setting[1] - PRINTED_MB))


def _full_rank_mib(result: Result) -> list[float]:
    return [2 * parameters / MIB for parameters in result["llama"]["of full rank"].values()]


_BARS = [figure[1] for figure in FIGURE6.values()]


def show_count(statement: str, names: tuple[str, ...]) -> Claim:
    """What is claimed of the numbers of parameters that a table prints."""
    return Claim(
        statement=statement,
        paper=", ".join(f"{SHAPES[name].printed}M" for name in names),
        criterion="the converted model's trainable parameters, to the printed digits",
        passes=lambda r: all(_as_printed(r, name) for name in names),
        measured=lambda r: _counts(r, names),
        kind=ARITHMETIC,
    )


CLAIMS = (
    show_count("LoRA, Table 4: parameters on GPT-3's q and v", GPT3),
    show_count("LoRA, Table 2: RoBERTa base and large, DeBERTa XXL", ENCODERS),
    show_count("LoRA, Table 3: GPT-2 medium and large, r = 4", GPT2),
    Claim(
        statement="LoRA, section 4.2: GPT-3's checkpoint shrinks from 350 GB to 35 MB (r = 4, q and v)",
        paper=f"{CHECKPOINT_MB} MB, roughly 10,000 times smaller",
        criterion=f"bytes of the adapter's parameters in 16 bits round to {CHECKPOINT_MB} MB",
        passes=lambda r: round(r["checkpoint"]["adapter"] / 1e6) == CHECKPOINT_MB,
        measured=lambda r: (
            f"{r['checkpoint']['model'] / 1e9:.1f} GB to {r['checkpoint']['adapter'] / 1e6:.1f} MB: "
            f"{_times_smaller(r):,.0f} times"
        ),
        kind=ARITHMETIC,
    ),
    Claim(
        statement="LoRA, sections 1 and 4.2: about 3 times less memory, no optimizer states of frozen weights",
        paper="3 times; GPT-3 from 1.2 TB to 350 GB",
        criterion=f"weights, gradients and AdamW's states: at least {LEAST_RATIO} times fewer bytes",
        passes=lambda r: min(_ratios(r).values()) >= LEAST_RATIO,
        measured=lambda r: ", ".join(f"{n}: {ratio:.2f} times" for n, ratio in _ratios(r).items()),
        kind=ARITHMETIC,
    ),
    Claim(
        statement="LoRA: an adapter is small as a file, and easy to hand on (SmolLM2, 16 bits)",
        paper="-",
        criterion=f"the file takes at most {MOST_OVERHEAD:.0%} more than its parameters",
        passes=lambda r: max(_overheads(r)) <= MOST_OVERHEAD,
        measured=lambda r: ", ".join(
            f"{name}: {a['weights_bytes'] / 1e6:.2f} MB"
            for name, a in r["files"]["adapters"].items()
        ),
        kind=OTHER,
    ),
    Claim(
        statement="QLoRA, section 3: LoRA takes 0.2 % of LLaMA-7B's weights, 26 MB",
        paper=f"{PRINTED_MB} MB",
        criterion="0.2 % of the linear weights, 2 bytes each, rounds to 26 MB",
        passes=lambda r: round(_share_in_mb(r)) == PRINTED_MB,
        measured=lambda r: f"{_share_in_mb(r):.2f} MB",
        kind=ARITHMETIC,
    ),
    Claim(
        statement="QLoRA, section 3: which of the settings that it searched takes 26 MB (its layers, r 8 to 256)",
        paper=f"{PRINTED_MB} MB",
        criterion="none: the paper does not say which it means",
        passes=None,
        measured=lambda r: "nearest: {} with {:.1f} MB".format(*_nearest(r)),
        kind=ARITHMETIC,
    ),
    Claim(
        statement=f"QLoRA, Figure 6: adapters of LLaMA-7B to 65B (r = {FULL_RANK} on all linear layers)",
        paper=" / ".join(f"{bar:g}" for bar in _BARS) + " MB",
        criterion="parameters, 2 bytes each, within 1 %",
        passes=lambda r: all(
            abs(ours / bar - 1) <= 0.01 for ours, bar in zip(_full_rank_mib(r), _BARS, strict=True)
        ),
        measured=lambda r: " / ".join(f"{ours:g}" for ours in _full_rank_mib(r)) + " MiB",
        kind=ARITHMETIC,
    ),
)


def errata(result: Result) -> list[str]:
    medium, large = (result["counts"][name] / 1e6 for name in GPT2)
    checkpoint = result["checkpoint"]["adapter"]
    whole = sum(result["training"][GPT3[-1]]["full"].values())
    name, size = _nearest(result)
    return [
        f"LoRA, Table 3: 2 n d r is {medium:.3f}M for GPT-2 medium and {large:.3f}M for large, where .35M and "
        ".77M are printed: the numbers of the prefix rows beside them.",
        f"LoRA, section 4.2: GPT-3's checkpoint with r = 4 takes {checkpoint / 1e6:.1f} MB "
        f"({checkpoint / MIB:.1f} MiB), not 35, and is {_times_smaller(result):,.0f} times smaller, not 10,000.",
        f"LoRA, section 4.2: {PRINTED_TB} TB for training GPT-3 are {PRINTED_TB * 1e12 / PAPER_PARAMETERS:.1f} "
        "bytes for each parameter: weights, gradients and AdamW's two states take 8 with all in 16 bits "
        f"({whole / 1e12:.2f} TB).",
        f"QLoRA, section 3: 26 MB is 0.2 % of the linear weights, but no adapter that the paper tried takes it: "
        f"the nearest ({name}) takes {size:.1f} MB, its own recipe, r = {FULL_RANK} on all layers, "
        f"{2e-6 * next(iter(result['llama']['of full rank'].values())):.0f} MB.",
    ]


def lessons(result: Result) -> list[str]:
    return [
        "An adapter of rank r on a fused q, k, v matrix costs as many parameters as two on q and v, and adapts k "
        "as well."
    ]


EXPERIMENT = Experiment(
    "lora_sizes",
    "LoRA: parameters, checkpoints, memory",
    (0.1, 0.1),
    run,
    CLAIMS,
    lora_sizes_shown.section,
    lora_sizes_shown.plots,
    errata,
    lessons,
)
