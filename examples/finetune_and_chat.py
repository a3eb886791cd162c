"""Fine-tune a model through its weights in 4 bits on a JSON Lines file, and let it answer before and after.

    python examples/finetune_and_chat.py path/to/model data.jsonl --prompt "Who was Gauss?"

path/to/model is a local Hugging Face folder with safetensors. Each line of data.jsonl has messages, or instruction
and output, or prompt and completion, or text. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse

import torch

from qlora import QLoRAConfig
from qlora.data import load_dataset
from qlora.generate import generate
from qlora.pretrained import load_quantized, load_tokenizer
from qlora.recipe import TrainConfig
from qlora.records import PROMPT_STYLES
from qlora.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("data", help="JSON Lines file to learn from")
    parser.add_argument("--prompt", required=True, help="what the model is asked")
    parser.add_argument(
        "--style", choices=PROMPT_STYLES, help="form of the prompt (default: chat if it can)"
    )
    parser.add_argument("--output", default="my-adapter", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter (default: 16)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    style = args.style or ("chat" if tokenizer.chat_template else "plain")
    recipe = TrainConfig(steps=args.steps)  # the rest as in the paper's Guanaco
    data = load_dataset(args.data, tokenizer, recipe.max_length)

    torch.manual_seed(recipe.seed)  # the adapter's first values
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, report = load_quantized(args.model, QLoRAConfig(rank=args.rank), device=device)
    print(report)

    print("before:", generate(model, tokenizer, args.prompt, style=style))
    result = train(model, data, recipe, args.output)
    print(f"{result.steps} steps in {result.seconds:.0f} s, last loss {result.loss:.4f}")
    print("after:", generate(model, tokenizer, args.prompt, style=style))
    print(f"The adapter is in {args.output}; qlora generate and PEFT read it.")


if __name__ == "__main__":
    main()
