from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paper_repro.figure6 import FIGURE6, MIB
from paper_repro.measures import lora_shapes
from tests.paper import shrink_llama
from tests.paper_results import change


def passing() -> dict[str, Any]:
    full = {"weights": 100, "gradients": 100, "optimizer": 200}
    return {
        "counts": {
            "GPT-2 M": 350_000,
            "GPT-2 L": 770_000,
            "RoBERTa base": 294_912,
            "RoBERTa large": 786_432,
            "DeBERTa XXL": 4_718_592,
            "GPT-3, r 1": 4_718_592,
            "GPT-3, r 8": 37_748_736,
        },
        "checkpoint": {"adapter": 35_000_000, "model": 350 * 10**9},
        "training": {
            name: {"full": full, "lora": {"weights": 101, "gradients": 1, "optimizer": 2}}
            for name in lora_shapes.TRAINED
        },
        "llama": {
            "linear": 6_476_005_376,
            "of rank 1": {"k and q": 1_625_000, "all": 2_498_560},
            "of full rank": {size: bars[1] * MIB / 2 for size, bars in FIGURE6.items()},
        },
        "files": {
            "model_parameters": 10**6,
            "adapters": {
                "q and v, r 4": {"parameters": 1000, "weights_bytes": 2080, "folder_bytes": 2500}
            },
        },
    }


BREAKING = [
    change("counts", "GPT-3, r 8", to=37_600_000),
    change("counts", "DeBERTa XXL", to=4_800_000),
    change("counts", "GPT-2 M", to=393_216),
    change("checkpoint", "adapter", to=37_748_736),
    change("training", "GPT-2 M", "lora", "weights", to=140),
    change("files", "adapters", "q and v, r 4", "weights_bytes", to=2200),
    change("llama", "linear", to=6_738_415_616),
    None,
    change("llama", "of full rank", "7b", to=159_907_840),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
    for name, shape in lora_shapes.SHAPES.items():
        layers = "n_layer" if shape.kind == "gpt2" else "num_hidden_layers"
        small = replace(shape, sizes=shape.sizes | {layers: 1})
        monkeypatch.setitem(lora_shapes.SHAPES, name, small)
    monkeypatch.setattr(lora_shapes, "CHECKPOINT", lora_shapes.SHAPES["GPT-3, r 1"])
