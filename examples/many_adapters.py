"""Several adapters on one base in 4 bits: load, switch, mix, and use another one for each row of a batch.

    python examples/many_adapters.py path/to/model adapters/poems adapters/code --prompt "Hello"

path/to/model is a local Hugging Face folder with safetensors; adapters are folders that qlora or PEFT wrote for it.
The base stays as it is: every adapter can be taken off again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import qlora
from qlora.generate import generate
from qlora.pretrained import load_quantized, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("adapters", nargs="+", help="adapter folders, with names of their own")
    parser.add_argument("--prompt", required=True, help="what the model is to continue")
    parser.add_argument("--tokens", type=int, default=40, help="how far (default: 40 tokens)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bare = qlora.QLoRAConfig(target_modules=None)  # no adapter yet
    model, _ = load_quantized(args.model, bare, device=device)
    names = [Path(folder).name for folder in args.adapters]
    for folder, name in zip(args.adapters, names, strict=True):
        qlora.load_adapter(model, folder, name)
        size, base = qlora.adapter_bytes(model, name)
        print(f"{name}: {size:,} bytes, {size / base:.2%} of the base")

    try:
        qlora.combine_adapters(model, dict.fromkeys(names, 1 / len(names)), "mix")
    except ValueError as reason:  # of DoRA and of modules that are trained whole there is no sum
        print(f"no mix: {reason}")
    for name in (*qlora.adapter_names(model), None):
        with qlora.use_adapter(model, name):
            answer = generate(model, tokenizer, args.prompt, max_new_tokens=args.tokens)
        print(f"\n{name or 'base'}: {answer}")

    rows = [*names, None]  # one for each row of the batch; None is the base
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(device)
    with qlora.use_adapter(model, rows), torch.no_grad():
        logits = model(ids.expand(len(rows), -1)).logits
    for name, token in zip(rows, logits[:, -1].argmax(-1), strict=True):
        print(f"\nnext token, one batch, {name or 'base'}: {tokenizer.decode(token)!r}")


if __name__ == "__main__":
    main()
