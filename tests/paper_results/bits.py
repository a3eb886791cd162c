from __future__ import annotations

from typing import Any

import pytest

from paper_repro import bits
from qlora import shapes
from tests.paper import shrink_llama
from tests.paper_results import change


def _sizes(hidden: int, layers: int, feed_forward: int) -> dict[str, int]:
    linear = layers * (4 * hidden**2 + 3 * hidden * feed_forward)
    matrices = [hidden**2] * 4 + [hidden * feed_forward] * 3
    quantized = layers * sum(bits.quantized_bytes(numel) for numel in matrices)
    return {
        "parameters": linear,
        "linear_parameters": linear,
        "linear_bytes": quantized,
        "formula_bytes": quantized,
        "base_bytes": bits.llama_bytes(hidden, layers, feed_forward),
        "lora_parameters": 64 * layers * (8 * hidden + 3 * (hidden + feed_forward)),
    }


def passing() -> dict[str, Any]:
    models = {
        name.replace("llama", "LLaMA").replace("b", "B"): _sizes(hidden, layers, feed_forward)
        for name, (hidden, layers, _, feed_forward) in shapes.LLAMA.items()
    }
    return {"bits": {"nf4": 4.5, "nf4+dq": 4.126955}, "models": models}


BREAKING = [
    change("bits", "nf4+dq", to=4.25),
    change("models", "LLaMA-13B", "base_bytes", to=7_201_419_361),
    change("models", "LLaMA-65B", "base_bytes", to=40e9),
    change("models", "LLaMA-7B", "lora_parameters", to=159_907_841),
]


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
