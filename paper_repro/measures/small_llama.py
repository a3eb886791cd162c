"""A recipe run in small: a random LLaMA and random tokens, from the base to the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qlora import QLoRAConfig, load_adapter, quantize_model
from qlora.data import Example
from qlora.recipe import TrainConfig
from qlora.testing import relative_rmse
from qlora.train import train


def run(
    sizes: dict[str, int], adapter: QLoRAConfig, training: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """Train; then compare the answers of the trained model, of the base, and of the adapter loaded anew.

    Args:
        sizes: what transformers' `LlamaConfig` says other than by default.
        adapter, training: the recipe; the training's seed is that of weights and tokens too.
        device: where it runs.
    """
    model, base, again = (_network(sizes, adapter, training.seed).to(device) for _ in range(3))
    data = _random_examples(training, sizes["vocab_size"])
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train(model, data, training, folder, progress=False)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        written = sorted(path.name for path in folder.glob("adapter*"))
        load_adapter(again, folder)
    ids = data[0].input_ids[None].to(device)
    with torch.no_grad():
        before, trained, loaded = (each.eval()(ids).logits for each in (base, model, again))
    return {
        "metrics": [json.loads(line) for line in lines],
        "written": written,
        "learned": relative_rmse(trained, before),
        "apart": relative_rmse(loaded, trained),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _network(sizes: dict[str, int], adapter: QLoRAConfig, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    quantize_model(model, adapter)
    return model


def _random_examples(training: TrainConfig, vocabulary: int) -> list[Example]:
    """One for each place in each batch, of all lengths up to the longest."""
    generator = torch.Generator().manual_seed(training.seed)
    count, longest = training.steps * training.batch_size, training.max_length
    lengths = torch.linspace(longest // 8, longest, count).int().tolist()
    drawn = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
    return [Example(ids, ids) for ids in drawn]
