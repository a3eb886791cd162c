"""Bits and bytes in closed form."""

from __future__ import annotations

import pytest

from paper_repro import bits
from qlora import shapes
from tests.paper_results import bits as results


@pytest.mark.parametrize(
    ("name", "base", "lora"),
    [
        ("7B", 3_865_592_704, 159_907_840),
        ("13B", 7_201_419_360, 250_347_520),
        ("33B", 17_414_091_152, 487_587_840),
        ("65B", 34_458_929_344, 799_539_200),
    ],
)
def test_bytes_and_adapters_of_llama(name: str, base: int, lora: int) -> None:
    hidden, layers, _, feed_forward = shapes.LLAMA[f"llama-{name.lower()}"]
    assert bits.llama_bytes(hidden, layers, feed_forward) == base
    result = results.passing()
    sizes = result["models"][f"LLaMA-{name}"]
    sizes["lora_parameters"] = lora
    assert bits._lora_exact(result)
    sizes["lora_parameters"] -= 1
    assert not bits._lora_exact(result)


def test_bytes_count_short_blocks() -> None:
    assert bits.quantized_bytes(64 * 256 + 1) == 8193 + 257 + 4 * 2 + 4
