"""SmolLM2 in 4 bits, written by us for transformers with bitsandbytes: `python -m paper_repro.interchange`.

No claim of the paper, but what makes its models exchangeable: quantized here, saved in bitsandbytes' layout and
read by transformers, the model has the same weights, bit for bit, and the same perplexity. Needs bitsandbytes,
which nothing else here does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.harness.lab import Lab
from paper_repro.materials import model
from paper_repro.measures import perplexity
from qlora import QLoRAConfig, QLoRALinear
from qlora.bnb import METHOD
from qlora.bnb_format import to_bitsandbytes
from qlora.data import Example
from qlora.pretrained import load_quantized, quantize_folder

WINDOWS, WINDOW_TOKENS = 8, 512


def compare(
    folder: Path, batches: Sequence[Sequence[Example]], config: QLoRAConfig
) -> dict[str, Any]:
    """Perplexity of a model folder quantized here, and of what transformers with bitsandbytes reads of it.

    Returns:
        The results of `perplexity.measure` as "ours" and "theirs", and the number of weights that are "equal", of
        "weights".
    """
    from transformers import AutoModelForCausalLM

    ours, _ = load_quantized(folder, config, precision="float32")
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary, "model")
        quantize_folder(folder, written, config, layout=METHOD)
        theirs = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QLoRALinear)}
    for name in layers:
        # On processors with bf16 instructions a forward pass would round the scales and inputs to it, for good.
        theirs.get_submodule(name).support_avx512bf16_for_cpu = False
    equal = [_equal(layer, theirs.get_submodule(name)) for name, layer in tqdm(layers.items())]
    found = {"ours": perplexity.measure(ours, batches, "ours")}
    found["theirs"] = perplexity.measure(theirs, batches, METHOD)
    return found | {"weights": len(equal), "equal": sum(equal)}


def _equal(ours: QLoRALinear, theirs: torch.nn.Module) -> bool:
    state = theirs.state_dict()
    return all(
        tensor.dtype == state[key].dtype and torch.equal(tensor, state[key])
        for key, tensor in to_bitsandbytes(ours.weight).items()
    )


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # where bitsandbytes would look for a kernel
    with Lab().lock() as lab:
        folder = model.model_folder(lab.folder)
        windows = perplexity.wikipedia_windows(lab, folder, WINDOWS, WINDOW_TOKENS)
    failed = False
    for format, double_quant in (("nf4", True), ("fp4", False)):
        config = QLoRAConfig(format=format, double_quant=double_quant, target_modules=None)
        found = compare(folder, windows, config)
        ours, theirs = found["ours"], found["theirs"]
        print(
            f"{model.MODEL_NAME}, {format}{' + DQ' if double_quant else ''}, {ours['tokens']:,} tokens: "
            f"perplexity {ours['perplexity']:.5f} here, {theirs['perplexity']:.5f} with {METHOD}; "
            f"{found['equal']} of {found['weights']} weights bit-identical"
        )
        failed |= found["equal"] < found["weights"] or abs(ours["nll"] - theirs["nll"]) > 1e-6
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
