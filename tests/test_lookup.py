"""The look-up in registers: its PTX, run by an emulator, and its portable twin hold the rounded codebook."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import reference
from qlora.kernels.formats import FORMATS
from qlora.kernels.lookup import (
    COPIES,
    LOOK_UP_PTX,
    load_table,
    look_up,
    lookup_table,
    rounded_codebook,
    uses_ptx,
)
from tests import ptx
from tests.on_device import DEVICES, INTERPRETED, assert_identical, compiled_only

CPU = torch.device("cpu")
HALF_DTYPES = (torch.float16, torch.bfloat16)

every_codebook = pytest.mark.parametrize(
    ("format", "dtype"), [(format, dtype) for format in sorted(FORMATS) for dtype in HALF_DTYPES]
)


def _words(random: int) -> Tensor:
    """int32: each byte value at each of the four positions between random ones, and random words."""
    bytes_ = torch.randint(
        0, 256, (4 * 256 + random, 4), generator=torch.Generator().manual_seed(0)
    )
    for position in range(4):
        bytes_[256 * position : 256 * (position + 1), position] = torch.arange(256)
    return bytes_.to(torch.uint8).view(torch.int32).view(-1)


def _expected(words: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """`dtype` [words, 8]: of the first byte the high nibble's value, then the low one's; then the second byte's."""
    values, _ = rounded_codebook(format, dtype)
    packed = words.view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1)
    return values[codes.long()].view(-1, 8)


# --- PTX, emulated ----------------------------------------------------------------------------------


def _run(text: str, words: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The four pairs that the PTX makes of each word, as `dtype` [words, 8]; a pair's first is its lower half."""
    table = lookup_table(format, dtype, CPU)[0]
    inputs = [words.numpy().view(np.uint32), *table.numpy().view(np.uint32)[:, None]]
    pairs = np.stack(ptx.run(text, inputs, 4), axis=1)
    return torch.from_numpy(pairs.view(np.int32)).view(torch.int16).view(dtype)


@every_codebook
def test_ptx_looks_up_every_byte_and_many_words(format: str, dtype: torch.dtype) -> None:
    words = _words(100_000)
    assert_identical(_run(LOOK_UP_PTX, words, format, dtype), _expected(words, format, dtype))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x9D8C", "0x8C9D"),
        ("0xBFAE", "0x3726"),
        ("0xCA", "0xAC"),
        ("0x4051", "0x5140"),
        ("codes1, codes0, 16", "codes1, codes0, 8"),
        ("0x77777777", "0xFFFFFFFF"),
    ],
)
def test_the_emulator_tells_a_wrong_table(right: str, wrong: str) -> None:
    assert right in LOOK_UP_PTX
    words, case = _words(0), ("nf4", torch.bfloat16)
    actual = _run(LOOK_UP_PTX.replace(right, wrong), words, *case)
    assert not torch.equal(actual, _expected(words, *case))


def _evaluate(instruction: str, *operands: int) -> int:
    """$0 of one instruction, given $1, $2, ..."""
    words = [np.array([operand], np.uint32) for operand in operands]
    return ptx.run("{" + instruction + ";}", words, 1)[0].item()


@pytest.mark.parametrize(
    ("selector", "result"),
    [
        ("0x3210", 0x8F3C2B1A),  # a itself
        ("0x7654", 0x7F6E5D9C),  # b itself
        ("0x7531", 0x7F5D8F2B),  # every other byte, the lowest first
        ("0x0000", 0x1A1A1A1A),
        ("0xBA98", 0xFF000000),  # signs of a: 8F is negative
        ("0xFEDC", 0x000000FF),  # signs of b: 9C is negative
        ("0x4B3C", 0x9CFF8FFF),
        ("0xABCD3210", 0x8F3C2B1A),  # the upper half of the selector is not used
    ],
)
def test_prmt(selector: str, result: int) -> None:
    assert _evaluate(f"prmt.b32 $0, $1, $2, {selector}", 0x8F3C2B1A, 0x7F6E5D9C) == result
    bits = int(selector, 16)
    assert _evaluate("prmt.b32 $0, $1, $2, $3", 0x8F3C2B1A, 0x7F6E5D9C, bits) == result


@pytest.mark.parametrize(
    ("table", "result"),
    [
        (0x80, 0xC0A08000 & 0xA0F0CC0F & 0x0FF0AA55),
        (0xFE, 0xC0A08000 | 0xA0F0CC0F | 0x0FF0AA55),
        (0x96, 0xC0A08000 ^ 0xA0F0CC0F ^ 0x0FF0AA55),
        (0xCA, 0xC0A08000 & 0xA0F0CC0F | ~0xC0A08000 & 0x0FF0AA55),  # a chooses b or c
        (0xF0, 0xC0A08000),
        (0xCC, 0xA0F0CC0F),
        (0xAA, 0x0FF0AA55),
        (0x1A, (0xC0A08000 & 0xA0F0CC0F | 0x0FF0AA55) ^ 0xC0A08000),
        (0x00, 0),
    ],
)
def test_lop3(table: int, result: int) -> None:
    """Tables are the formula applied to 0xF0, 0xCC and 0xAA, as the ISA has it."""
    instruction = f"lop3.b32 $0, $1, $2, $3, {table:#x}"
    assert _evaluate(instruction, 0xC0A08000, 0xA0F0CC0F, 0x0FF0AA55) == result


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("shl.b32 $0, $1, 4", 0x76543210),
        ("shr.u32 $0, $1, 28", 0x8),
        ("shr.u32 $0, $1, 0", 0x87654321),
        ("shl.b32 $0, $1, 32", 0),
        ("shr.u32 $0, $1, 33", 0),
        ("and.b32 $0, $1, 0x0F0F0F0F", 0x07050301),
    ],
)
def test_shifts_and_masks(instruction: str, result: int) -> None:
    assert _evaluate(instruction, 0x87654321) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{xor.b32 $0, $1, $1;}", "not known: 'xor.b32"),
        ("{prmt.b32.f4e $0, $1, $1, $1;}", "not known: 'prmt.b32.f4e"),
        ("{shr.s32 $0, $1, 4;}", "not known: 'shr.s32"),
        ("{and.b32 $0, $1;}", "takes 2 operands"),
        ("{and.b32 a, $1, $1;}", "'a' is not declared"),
        ("{.reg .b32 a; and.b32 $0, a, $1;}", "'a' holds nothing"),
        ("{.reg .b32 a; and.b32 $0, $1, $1; and.b32 a, $1, $1;}", "'\\$1' holds nothing, or no"),
        ("{.reg .b64 a;}", "must be of type .b32"),
        ("{and.b32 $1, $1, $1;}", "'\\$1' is not declared"),
        ("{.reg .b32 a;}", "'\\$0' holds nothing"),
        ("{and.b32 $0, $1, $1}", "must end with a semicolon"),
        ("and.b32 $0, $1, $1;", "one block in braces"),
    ],
)
def test_the_emulator_refuses_what_it_does_not_know(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptx.run(text, [np.zeros(1, np.uint32)], 1)


# --- Triton -----------------------------------------------------------------------------------------


@triton.jit
def _look_up_kernel(words_ptr, table_ptr, out_ptr, SIZE: tl.constexpr, PTX: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    table = load_table(table_ptr, tl.arange(0, SIZE))
    values = look_up(tl.load(words_ptr + offset), table, out_ptr.dtype.element_ty, PTX)
    code = offset[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + code, values.reshape(SIZE, 8))


def _look_up(words: Tensor, format: str, dtype: torch.dtype, device: str, ptx: bool) -> Tensor:
    words, table = words.to(device), lookup_table(format, dtype, torch.device(device))
    out = torch.full((len(words), 8), torch.nan, dtype=dtype, device=device)
    _look_up_kernel[(len(words) // 1024,)](words, table, out, SIZE=1024, PTX=ptx)
    return out.cpu()


@pytest.mark.parametrize("device", DEVICES)
@every_codebook
def test_the_portable_path_looks_up_every_byte(
    device: str, format: str, dtype: torch.dtype
) -> None:
    words = _words(0)
    actual = _look_up(words, format, dtype, device, False)
    assert_identical(actual, _expected(words, format, dtype))


@pytest.mark.gpu
@compiled_only
@every_codebook
def test_ptx_on_the_device(format: str, dtype: torch.dtype) -> None:
    words = _words(100 * 1024)
    actual = _look_up(words, format, dtype, "cuda", True)
    assert_identical(actual, _look_up(words, format, dtype, "cuda", False))
    assert_identical(actual, _expected(words, format, dtype))


def test_the_interpreter_does_without_ptx() -> None:
    assert uses_ptx() == (not INTERPRETED and torch.version.hip is None)


# --- The codebook in 16 bits ------------------------------------------------------------------------


def _errors(format: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codebook, and what the rounded one is off by; fp64 [16]."""
    codebook = torch.tensor(FORMATS[format].values, dtype=torch.float64)
    values, factor = rounded_codebook(format, dtype)
    return codebook, values.double() / factor - codebook


def _worst(codebook: Tensor, error: Tensor) -> float:
    nonzero = codebook != 0
    return (error[nonzero] / codebook[nonzero]).abs().max().item()


@every_codebook
def test_a_factor_below_two_and_an_exact_zero(format: str, dtype: torch.dtype) -> None:
    values, factor = rounded_codebook(format, dtype)
    codebook, _ = _errors(format, dtype)
    assert values.dtype == dtype
    assert 1 <= factor < 2
    assert_identical(values == 0, codebook == 0)
    assert_identical(values.sign().double(), codebook.sign())


def _frequency(blocksize: int) -> Tensor:
    """How often each code of NF4 occurs in normal data: fp64 [16]."""
    x = torch.randn(2**22, generator=torch.Generator().manual_seed(0))
    packed, _ = reference.quantize_4bit(x, "nf4", blocksize)
    codes = torch.stack([packed >> 4, packed & 15]).view(-1)
    return codes.long().bincount(minlength=16).double() / x.numel()


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_nf4_is_off_by_less_than_rounded_weights(dtype: torch.dtype, blocksize: int) -> None:
    """Root mean squares, of the codebook's errors and of those of weights that are scaled and then rounded."""
    codebook, error = _errors("nf4", dtype)
    frequency = _frequency(blocksize)
    scales = 1 + torch.arange(4096, dtype=torch.float64)[:, None] / 4096
    rounded = (scales * codebook).to(dtype).double() / scales - codebook
    assert error.square() @ frequency < (rounded.square() @ frequency).mean()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("format", sorted(FORMATS.keys() - {"nf4"}))
def test_other_formats_lose_next_to_nothing(format: str, dtype: torch.dtype) -> None:
    """Their values are small multiples of one number, which the factor makes representable."""
    codebook, error = _errors(format, dtype)
    assert _worst(codebook, error) < 2**-22


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_errors_of_long_sums_do_not_add_up(dtype: torch.dtype, blocksize: int) -> None:
    """The error of NF4, averaged over the codes of normal data as often as they occur.

    Over k inputs of one sign, magnitudes of a normal distribution, it adds up to sqrt(2 / pi) k times this, where y
    has the size of sqrt(k) times a weight. For 4096 that must be below half a unit in y's last place, of which the tolerance rule
    allows two.
    """
    frequency = _frequency(blocksize)
    codebook, error = _errors("nf4", dtype)
    size = (frequency * codebook.square()).sum().sqrt()
    adds_up = (2 / torch.pi) ** 0.5 * 4096**0.5 * (frequency * error).sum().abs() / size
    assert adds_up < torch.finfo(dtype).eps / 2


# --- The table --------------------------------------------------------------------------------------


@every_codebook
def test_the_table_holds_bytes_in_copies(format: str, dtype: torch.dtype) -> None:
    table = lookup_table(format, dtype, CPU)
    assert table.dtype == torch.int32
    assert table.shape == (COPIES, 8)
    assert table.eq(table[0]).all()
    high, low = table[0].view(torch.uint8).view(2, 16).int()
    values, _ = rounded_codebook(format, dtype)
    assert_identical(high << 8 | low, values.view(torch.int16).int() & 0xFFFF)
