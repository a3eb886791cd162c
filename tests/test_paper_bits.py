"""Bits and bytes in closed form."""

from __future__ import annotations

import pytest

from paper_repro import bits
from qlora import shapes


@pytest.mark.parametrize(
    ("name", "base", "lora"),
    [
        ("7B", 3_865_592_704, 159_907_840),
        ("13B", 7_201_419_360, 250_347_520),
        ("33B", 17_414_091_152, 487_587_840),
        ("65B", 34_458_929_344, 799_539_200),
    ],
)
def test_bytes_of_llama(name: str, base: int, lora: int) -> None:
    hidden, layers, _, feed_forward = shapes.LLAMA[f"llama-{name.lower()}"]
    assert bits.llama_bytes(hidden, layers, feed_forward) == base
    assert 64 * layers * (8 * hidden + 3 * (hidden + feed_forward)) == lora


def test_bytes_count_short_blocks() -> None:
    assert bits.quantized_bytes(64 * 256 + 1) == 8193 + 257 + 4 * 2 + 4
