"""Section 3 and Figure 6: bits per parameter and bytes, from the library's own objects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.figure6 import FIGURE6, MIB
from paper_repro.harness import draw
from paper_repro.harness.experiment import ARITHMETIC, Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, model
from paper_repro.measures.in_data_type import NF4, NF4_DQ
from qlora import QLoRAConfig, quantize_4bit, quantize_model, shapes

# Figure 6's bars for the model, in MB.
BARS = {size.upper(): bars[0] for size, bars in FIGURE6.items()}
PAPER_BITS = {NF4: 4.5, NF4_DQ: 4.127}
RANK = 64


def run(lab: Lab) -> Result:
    folder = model.model_folder(lab.folder)
    settings = {"model": assets.MODEL_SHA256, "llama": BARS, "rank": RANK}
    return lab.measure("bits", settings, lambda: _measure(folder))


def quantized_bytes(numel: int, blocksize: int = 64, nested: int = 256) -> int:
    """Bytes of one weight in NF4 with double quantization: codes, 8-bit scales, their scales, one offset."""
    blocks = math.ceil(numel / blocksize)
    return math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / nested) + 4


def llama_bytes(hidden: int, layers: int, feed_forward: int) -> int:
    """Bytes of a LLaMA with NF4+DQ linear layers and the rest in 16 bits, in closed form."""
    linear = layers * (4 * hidden**2 + 3 * hidden * feed_forward)
    rest = 2 * shapes.VOCABULARY * hidden + (2 * layers + 1) * hidden
    return linear // 2 + linear // 64 + 4 * linear // 16384 + 4 * 7 * layers + 2 * rest


def _measure(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    square = torch.empty(4096, 4096, device="meta")
    bits = {
        NF4: quantize_4bit(square, double_quant=False).bits_per_parameter,
        NF4_DQ: quantize_4bit(square).bits_per_parameter,
    }
    small = AutoConfig.from_pretrained(folder, local_files_only=True)
    configs = {model.MODEL_NAME: small}
    configs |= {f"LLaMA-{name}": shapes.model_config(f"llama-{name}") for name in BARS}
    bar = tqdm(configs.items(), desc="shapes quantized on the meta device", unit="model")
    return {"bits": bits, "models": {name: _sizes(config) for name, config in bar}}


def _sizes(config: Any) -> dict[str, Any]:
    """The sizes of a model's parts, all read from the objects; only `formula` comes from arithmetic."""
    network = shapes.meta_model(config, torch.bfloat16)
    total = sum(parameter.numel() for parameter in network.parameters())
    linears = {
        name: module.weight.numel()
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    report = quantize_model(network, QLoRAConfig(rank=RANK))
    frozen = [p for p in network.parameters() if not p.requires_grad]
    return {
        "parameters": total,
        "linear_parameters": report.quantized_parameters,
        "linear_bytes": report.quantized_bytes,
        "formula_bytes": sum(quantized_bytes(linears[name]) for name in report.quantized),
        "base_bytes": report.quantized_bytes + sum(p.nbytes for p in frozen),
        "lora_parameters": report.trainable_parameters,
    }


def _llamas(result: Result) -> list[tuple[dict[str, Any], tuple[int, int, int, int]]]:
    """Sizes and shape of each."""
    return [(result["models"][f"LLaMA-{n}"], shapes.LLAMA[f"llama-{n.lower()}"]) for n in BARS]


def _all_exact(result: Result) -> bool:
    layers = all(m["linear_bytes"] == m["formula_bytes"] for m in result["models"].values())
    return layers and all(
        sizes["base_bytes"] == llama_bytes(hidden, layers, feed_forward)
        for sizes, (hidden, layers, _, feed_forward) in _llamas(result)
    )


def _lora_exact(result: Result) -> bool:
    """r (in + out) for each matrix, and the paper's r = 64 on all seven of a layer."""
    return all(
        sizes["lora_parameters"] == RANK * layers * (4 * 2 * hidden + 3 * (hidden + feed_forward))
        for sizes, (hidden, layers, _, feed_forward) in _llamas(result)
    )


CLAIMS = (
    Claim(
        statement="Double quantization takes 0.127 instead of 0.5 bits per parameter for scales",
        paper="4.127 bits per parameter",
        criterion="the same to three digits, read from a quantized 4096 x 4096 matrix",
        passes=lambda r: all(abs(r["bits"][name] - PAPER_BITS[name]) < 5e-4 for name in PAPER_BITS),
        measured=lambda r: f"{r['bits'][NF4_DQ]:.3f} (without: {r['bits'][NF4]:.3f})",
        kind=ARITHMETIC,
    ),
    Claim(
        statement="The 4-bit base takes what the arithmetic says, LLaMA-7B to 65B and SmolLM2",
        paper="formula of section 3",
        criterion="sum of `nbytes` over the quantized model equals the formula to the byte",
        passes=_all_exact,
        measured=lambda r: f"7B {r['models']['LLaMA-7B']['base_bytes']:,} bytes",
        kind=ARITHMETIC,
    ),
    Claim(
        statement="Figure 6: memory of the 4-bit base, 7B to 65B",
        paper=" / ".join(f"{bar:,}" for bar in BARS.values()) + " MB",
        criterion="below the figure's bars, which fit NF4 without double quantization and some overhead",
        passes=lambda r: all(
            sizes["base_bytes"] / MIB < bar
            for (sizes, _), bar in zip(_llamas(r), BARS.values(), strict=True)
        ),
        measured=lambda r: (
            " / ".join(f"{sizes['base_bytes'] / MIB:,.0f}" for sizes, _ in _llamas(r)) + " MiB"
        ),
        trend=True,
        kind=ARITHMETIC,
    ),
    Claim(
        statement="LoRA r = 64 on all linear layers: number of parameters, 7B to 65B",
        paper="2 n d r summed over the layers",
        criterion="the converted model's trainable parameters equal r (in + out) per layer",
        passes=_lora_exact,
        measured=lambda r: f"7B {r['models']['LLaMA-7B']['lora_parameters']:,}",
        kind=ARITHMETIC,
    ),
)


def section(result: Result) -> str:
    rows = []
    for name, sizes in result["models"].items():
        bits = 8 * sizes["linear_bytes"] / sizes["linear_parameters"]
        rows.append(
            (
                name,
                f"{sizes['linear_parameters']:,}",
                f"{sizes['linear_bytes']:,}",
                f"{sizes['formula_bytes']:,}",
                f"{bits:.3f}",
                f"{sizes['base_bytes'] / MIB:,.1f}",
                f"{sizes['lora_parameters']:,}",
            )
        )
    header = ["model", "linear parameters", "their bytes", "formula", "bits per parameter"]
    header += ["whole base, MiB", f"LoRA r {RANK}"]
    return (
        "Real model classes on torch's meta device, quantized by `quantize_model`; nothing is allocated. The "
        "whole base counts embeddings, output layer and norms in 16 bits.\n\n" + table(header, rows)
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    return {
        "Bits per parameter, by what they hold (block size 64)": show_bits(result, folder),
        "The whole base in NF4 with double quantization, beside Figure 6's bars for the model": show_bases(
            result, folder
        ),
    }


def show_bits(result: Result, folder: Path) -> Path:
    """Stacked bars: 4 bits of code, and the scales on top."""
    labels = {NF4: "NF4", NF4_DQ: "NF4 + double\nquantization"}
    path = folder / "bits.svg"
    with draw.figure(path, height=2.6) as axes:
        for row, (name, label) in enumerate(reversed(labels.items())):
            bits = result["bits"][name]
            axes.barh(row, 4, color=draw.BLUE, height=0.6)
            axes.barh(row, bits - 4, left=4, color=draw.ORANGE, height=0.6)
            axes.text(2, row, "4 code", ha="center", va="center", color="white")
            note = f"{bits:.3f}  ({bits - 4:.3f} scales); paper {PAPER_BITS[name]:g}"
            axes.text(bits + 0.05, row, note, va="center", color=draw.GREY)
            axes.text(-0.06, row, label, ha="right", va="center")
        axes.set(xlim=(0, 7.2), xticks=range(6), yticks=[], xlabel="bits per parameter")
    return path


def show_bases(result: Result, folder: Path) -> Path:
    path = folder / "bits_bases.svg"
    with draw.figure(path, height=3.2) as axes:
        ours = [sizes["base_bytes"] / MIB for sizes, _ in _llamas(result)]
        bars = ((-0.2, BARS.values(), draw.GREY, "paper"), (0.2, ours, draw.ORANGE, "ours"))
        for offset, heights, color, label in bars:
            for place, height in enumerate(heights):
                name = label if place == 0 else None
                axes.bar(place + offset, height / 1024, 0.38, color=color, label=name)
                words = {"ha": "center", "va": "bottom", "color": draw.GREY}
                axes.text(place + offset, height / 1024, f"{height / 1024:.1f}", **words)
        axes.set_xticks(range(len(BARS)), [f"LLaMA-{name}" for name in BARS])
        axes.set(ylabel="GiB")
        axes.legend(frameon=False, loc="upper left")
    return path


EXPERIMENT = Experiment(
    "bits", "Bits per parameter and bytes", (0.1, 0.1), run, CLAIMS, section, plots
)
