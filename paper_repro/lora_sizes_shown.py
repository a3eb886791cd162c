"""What `lora_sizes` found as tables and as a plot."""

from __future__ import annotations

from pathlib import Path

from paper_repro.harness import draw
from paper_repro.harness.experiment import Result, table
from paper_repro.materials import model
from paper_repro.measures.lora_shapes import PAPER_PARAMETERS, RANKS, SHAPES


def section(result: Result) -> str:
    counts = [
        (
            name,
            shape.rank,
            " and ".join(shape.targets),
            f"{shape.printed}M",
            f"{result['counts'][name]:,}",
        )
        for name, shape in SHAPES.items()
    ]
    training = [
        (
            f"{name}, {how}",
            *(f"{kept[part] / 1e9:,.2f}" for part in kept),
            f"{sum(kept.values()) / 1e9:,.2f}",
        )
        for name, both in result["training"].items()
        for how, kept in both.items()
    ]
    base = 2 * result["files"]["model_parameters"]
    files = [
        (
            name,
            f"{a['parameters']:,}",
            f"{2 * a['parameters']:,}",
            f"{a['weights_bytes']:,}",
            f"{a['folder_bytes']:,}",
            f"{a['weights_bytes'] / base:.2%}",
        )
        for name, a in result["files"]["adapters"].items()
    ]
    llama = [
        (name, *(f"{2 * rank * parameters / 1e6:.1f}" for rank in RANKS))
        for name, parameters in result["llama"]["of rank 1"].items()
    ]
    return "\n\n".join(
        (
            "Shapes on the meta device by transformers' classes, converted by `quantize_model` with "
            "`format=None`, LoRA over a dense base. GPT-2's and GPT-3's `c_attn` is q, k and v in one matrix: an "
            "adapter on it has r (d + 3 d) parameters, as many as two on q and on v. DeBERTa's rank is that of "
            "the scripts that came with the paper. GPT-3's shape has "
            f"{result['checkpoint']['model'] / 2e9:.1f} billion parameters here; the paper has "
            f"{PAPER_PARAMETERS / 1e9:.1f}.",
            table(["model", "r", "layers", "paper", "parameters"], counts),
            "One step of AdamW, GB of tensors: GPT-2 in 32 bits, GPT-3 all in 16. Activations come on top.",
            table(["", "weights", "gradients", "optimizer", "together"], training),
            f"Files of `save_adapter` for {model.MODEL_NAME}, bytes; the share is that of the model in 16 bits, "
            f"{base:,}. The folder has two settings files more.",
            table(
                ["adapter", "parameters", "2 bytes each", "its file", "folder", "of the model"],
                files,
            ),
            "MB in 16 bits of the settings that QLoRA searched, LLaMA-7B.",
            table(["layers", *(f"r {rank}" for rank in RANKS)], llama),
        )
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "lora_sizes.svg"
    with draw.figure(path, height=3.4) as axes:
        rows = range(len(SHAPES))
        printed = [1e6 * float(shape.printed) for shape in SHAPES.values()]
        ours = [result["counts"][name] for name in SHAPES]
        axes.hlines(rows, 1e5, ours, color=draw.LIGHT, linewidth=1)
        axes.scatter(printed, rows, 90, draw.GREY, marker="|", linewidth=2.5, label="printed")
        axes.scatter(ours, rows, 26, draw.ORANGE, label="counted")
        for row, count in zip(rows, ours, strict=True):
            axes.annotate(
                f"{count / 1e6:.3f}M",
                (count, row),
                (12, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(
            rows, [f"{n}, r {s.rank}" if ", r" not in n else n for n, s in SHAPES.items()]
        )
        axes.set(xscale="log", xlim=(2e5, 1.4e8), xlabel="trained parameters, q and v")
        axes.invert_yaxis()
        axes.legend(frameon=False, loc="upper right")
    return {"Parameters that LoRA trains: as its tables print them, and counted": path}
