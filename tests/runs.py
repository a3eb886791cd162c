"""Short training runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora.adapters import adapter_parameters
from qlora.recipe import TrainConfig
from qlora.train import TrainResult, train
from tests import tiny

SMALL = TrainConfig(
    learning_rate=5e-3,
    steps=6,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    checkpoint_every=2,
)


def model(dropout: float = 0.0, **settings: Any) -> torch.nn.Module:
    return tiny.quantized(tiny.llama(), dropout=dropout, **settings)


def run(
    output: Path,
    config: TrainConfig = SMALL,
    dropout: float = 0.1,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[torch.nn.Module, TrainResult]:
    """A quiet run of a model with these settings: the trained model, and what `train` returned."""
    trained = model(dropout, **settings or {})
    options = {"progress": False, **options}
    return trained, train(trained, tiny.examples(), config, output, **options)


def metrics(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(adapter_parameters(left).values(), adapter_parameters(right).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
