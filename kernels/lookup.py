"""The 16-entry look-up in registers: eight 4-bit codes become four pairs of 16-bit values.

A word of four packed bytes holds eight codes. PTX's `prmt` picks four bytes at once out of eight by a selector of
four nibbles, and packed codes *are* such selectors, but for the fourth bit of each: it chooses between
two results. With one table for the high and one for the low bytes of the values that makes 21 instructions for
eight codes, 2.6 each, and no memory access.

Values of 16 bits are not exact. The codebook is multiplied by a constant first, so chosen that it fits them well
(`rounded_codebook`), and the caller divides by the constant where it multiplies by the scale.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import formats
from qlora.kernels.primitives import INTERPRETED

COPIES = 8
"""Copies of the table: see `load_table`."""

_TYPICAL_ABSMAX = (2.2, 2.6, 3.0, 3.4, 3.8, 4.5, 5.5)
"""In standard deviations: from blocks of 32 to blocks of 4096 normal weights, and of such with heavier tails."""

_INPUTS_OF_ONE_SIGN = 1024

# $0 to $3: pairs, the value of a byte's high nibble in the lower half. $4: the word. $5 to $8: the values' high
# bytes, four entries each, $9 to $12 their low bytes.
# codes:  the lower three bits of each nibble, which `prmt` takes as the index of a byte among eight
# upper:  0xFF where a nibble's fourth bit is set; prmt copies a byte's sign bit where 8 is added to an index
# lop3 with 0xCA: (upper & b) | (~upper & a)
LOOK_UP_PTX = """
{
    .reg .b32 codes0, codes1, shifted, upper0, upper1, a, b, high0, high1, low0, low1;
    and.b32   codes0, $4, 0x77777777;
    shr.u32   codes1, codes0, 16;
    shl.b32   shifted, $4, 4;
    prmt.b32  upper0, $4, shifted, 0x9D8C;
    prmt.b32  upper1, $4, shifted, 0xBFAE;
    prmt.b32  a, $5, $6, codes0;
    prmt.b32  b, $7, $8, codes0;
    lop3.b32  high0, upper0, b, a, 0xCA;
    prmt.b32  a, $5, $6, codes1;
    prmt.b32  b, $7, $8, codes1;
    lop3.b32  high1, upper1, b, a, 0xCA;
    prmt.b32  a, $9, $10, codes0;
    prmt.b32  b, $11, $12, codes0;
    lop3.b32  low0, upper0, b, a, 0xCA;
    prmt.b32  a, $9, $10, codes1;
    prmt.b32  b, $11, $12, codes1;
    lop3.b32  low1, upper1, b, a, 0xCA;
    prmt.b32  $0, low0, high0, 0x4051;
    prmt.b32  $1, low0, high0, 0x6273;
    prmt.b32  $2, low1, high1, 0x4051;
    prmt.b32  $3, low1, high1, 0x6273;
}
"""
_PTX = tl.constexpr(LOOK_UP_PTX)
_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r,r,r,r,r")
_COPIES = tl.constexpr(COPIES)


@cache
def rounded_codebook(format: str, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(codebook * factor, rounded to a 16-bit `dtype` [16]; factor in [1, 2)).

    The factor is that of 16,384 for which a sum of 1024 inputs of one sign is off by least, at weights from a
    normal distribution. It makes NF4 a little better than weights that are rounded one by one, and leaves hardly a
    mean error, which would add up (tests/test_lookup.py has the figures); the other formats become exact.
    """
    form = formats.FORMATS[format]
    codebook = torch.tensor(form.values, dtype=torch.float64, device="cpu")
    factors = 1 + torch.arange(2**14, dtype=torch.float64, device="cpu") / 2**14
    errors = (factors[:, None] * codebook).to(dtype).double() / factors[:, None] - codebook
    ranked = errors[:, list(form.rank_to_code)]
    infinity = torch.tensor([torch.inf], device="cpu")
    edges = torch.cat([-infinity, form.thresholds, infinity]).double()
    worst = torch.zeros(len(factors), dtype=torch.float64, device="cpu")
    for absmax in _TYPICAL_ABSMAX:
        frequency = torch.special.ndtr(edges * absmax).diff()
        error = ranked.square() @ frequency + _INPUTS_OF_ONE_SIGN * (ranked @ frequency).square()
        worst = torch.maximum(
            worst, error / (codebook[list(form.rank_to_code)].square() @ frequency)
        )
    factor = factors[worst.argmin()].item()
    return (codebook * factor).to(dtype), factor


@cache
def lookup_table(format: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """int32 [COPIES, 8]: the high bytes of the 16 rounded values in four words, then the low bytes."""
    values, _ = rounded_codebook(format, dtype)
    low, high = values.view(torch.uint8).view(16, 2).unbind(1)
    words = torch.cat([high, low]).view(torch.int32)
    return words.repeat(COPIES, 1).to(device)


@triton.jit
def load_table(table_ptr, thread):
    """The table's eight words, int32 each, of the shape of `thread`, which numbers threads or groups of them.

    Threads read different copies. Otherwise the compiler sees that all of them hold the same, keeps it in uniform
    registers, which `prmt` cannot read, and moves each word again for each use.
    """
    word = table_ptr + thread % _COPIES * 8
    return (
        tl.load(word),
        tl.load(word + 1),
        tl.load(word + 2),
        tl.load(word + 3),
        tl.load(word + 4),
        tl.load(word + 5),
        tl.load(word + 6),
        tl.load(word + 7),
    )


@triton.jit
def look_up(words, table, dtype: tl.constexpr, PTX: tl.constexpr):
    """The rounded values of eight codes a word, the high nibble of the first byte first.

    words int32 [...] to `dtype` (fp16 or bf16) [..., 2, 2, 2]: two times two bytes of two codes.
    Without PTX the same is computed by plain shifts; that is what Triton's interpreter can run.
    """
    pair0, pair1, pair2, pair3 = _pairs(words, table, PTX)
    pairs = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
    first = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(first, second)


@triton.jit
def _pairs(words, table, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            _PTX,
            _CONSTRAINTS,
            [
                words,
                table[0],
                table[1],
                table[2],
                table[3],
                table[4],
                table[5],
                table[6],
                table[7],
            ],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return (
        _portable_pair(words, table),
        _portable_pair(words >> 8, table),
        _portable_pair(words >> 16, table),
        _portable_pair(words >> 24, table),
    )


@triton.jit
def _portable_pair(byte, table):
    """The pair of the lowest byte of each word."""
    return _portable_value(byte >> 4, table) | _portable_value(byte, table) << 16


@triton.jit
def _portable_value(code, table):
    """Both bytes of the value of the lowest nibble: chosen among four words each, then shifted out."""
    high = _portable_byte(code, table[0], table[1], table[2], table[3])
    return high << 8 | _portable_byte(code, table[4], table[5], table[6], table[7])


@triton.jit
def _portable_byte(code, word0, word1, word2, word3):
    lower = tl.where(code & 4 != 0, word1, word0)
    upper = tl.where(code & 4 != 0, word3, word2)
    return tl.where(code & 8 != 0, upper, lower) >> (code & 3) * 8 & 0xFF


def uses_ptx() -> bool:
    """Whether the look-up is compiled from PTX: on a CUDA device, and not in Triton's interpreter."""
    return not INTERPRETED.value and torch.version.hip is None
