"""Try a 4-bit data type of your own on a model: its error, perplexity and training, beside NF4's.

    python examples/new_data_type.py path/to/model data.jsonl --values -1 -0.75 ... 1

path/to/model is a local Hugging Face folder with safetensors, data.jsonl what it learns and is measured on. Without
--values: the 16 quantiles of a normal distribution in the middle of equal shares, which have no zero.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import NormalDist, mean

import torch

import qlora
from qlora.data import load_dataset
from qlora.evaluation import evaluate
from qlora.pretrained import load_dense, load_quantized, load_tokenizer
from qlora.recipe import TrainConfig
from qlora.testing import relative_rmse
from qlora.train import train

QUANTILES = [NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="JSON Lines file")
    parser.add_argument("--values", type=float, nargs=16, metavar="X", help="16 values in [-1, 1]")
    parser.add_argument("--steps", type=int, default=30, help="steps of training (default: 30)")
    parser.add_argument("--output", default="data-types", help="folder for the adapters")
    args = parser.parse_args()

    qlora.register_format("mine", args.values or [value / QUANTILES[-1] for value in QUANTILES])
    tokenizer = load_tokenizer(args.model)
    data = load_dataset(args.data, tokenizer)
    matrices = [p.detach() for p in load_dense(args.model).parameters() if p.ndim == 2]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = TrainConfig(steps=args.steps, gradient_accumulation_steps=4)
    print(f"{'':5} error of a weight, perplexity, after {args.steps} steps")
    for name in ("nf4", "mine"):
        quantized = [qlora.quantize_4bit(matrix, format=name) for matrix in matrices]
        errors = map(relative_rmse, map(qlora.dequantize_4bit, quantized), matrices)
        torch.manual_seed(0)  # the same first adapter for both
        config = qlora.QLoRAConfig(rank=16, format=name)
        model, _ = load_quantized(args.model, config, device=device)
        before = evaluate(model, data).perplexity
        train(model, data, recipe, Path(args.output, name), resume=False, progress=False)
        after = evaluate(model, data).perplexity
        print(f"{name:5} {mean(errors):17.4f}, {before:10.2f}, {after:.2f}", flush=True)


if __name__ == "__main__":
    main()
