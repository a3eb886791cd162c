"""The number formats: 4-bit codebooks for weights, 8-bit ones for scales and optimizer state, and how they are packed.

This is the only place that knows a codebook, the nibble order or a block size. Every backend (the
reference, the CPU path, the Triton kernels) encodes by the same rule, which the formats make explicit:

    rank = number of thresholds strictly below the normalized value      (so a tie takes the lower value)
    code = rank_to_code[rank]
    value = values[code]

where the thresholds are the fp32 midpoints between neighbouring values. `Format.cell_ranks` finds the rank
of a 4-bit format with one comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share one absmax. The QLoRA paper uses 64 (section 3)."""

NESTED_BLOCKSIZE = 256
"""Scales that share one second-level absmax (QLoRA, section 3, "Double Quantization")."""

STATE_BLOCKSIZE = 256
"""Elements of an 8-bit optimizer state that share an absmax, as in bitsandbytes."""

STATE_TILE = 1024
"""Elements: in the flat buffer of an optimizer state each parameter begins at a multiple of this."""

STATE_CELLS = 4096
"""Parts of [-1, 1], or of [0, 1], that a state's look-up of ranks is indexed by, see `state_cell`."""

CELLS = 128
"""Equal parts of [-1, 1] that `Format.cell_ranks` is indexed by: a byte each, one word in each of 32 banks."""


@dataclass(frozen=True)
class Format:
    """A 4-bit data type: 16 values in [-1, 1], indexed by code.

    A byte holds two codes, the element with the even index in its high nibble. Values that occur twice
    (the signed zeros of the floating-point formats) are encoded with the lower code only.
    """

    name: str
    values: tuple[float, ...]

    @property
    def thresholds(self) -> Tensor:
        """fp32 [15]: midpoints of neighbouring values, ascending, padded with +inf if a value repeats."""
        values = _float32([value for value, _ in self._ranked()])
        padding = _float32([torch.inf] * (16 - len(values)))
        return torch.cat([(values[:-1] + values[1:]) / 2, padding])

    @property
    def rank_to_code(self) -> tuple[int, ...]:
        """The code of each value in ascending order (16 entries; the last repeats where a value does)."""
        codes = [code for _, code in self._ranked()]
        return tuple(codes + codes[-1:] * (16 - len(codes)))

    @property
    def cell_ranks(self) -> Tensor:
        """uint8 [CELLS]: the rank at the lower end of each cell, from which a rank takes one comparison.

            base = cell_ranks[cell(x)];    rank = base + (x > thresholds[base])

        `cell` never decreases, so thresholds in lower cells are below x and those in higher cells are not.
        What is left is the threshold in x's own cell, of which there must be no more than one.
        """
        finite = self.thresholds[self.thresholds.isfinite()]
        return _ranks_by_cell(self.name, cell(finite), CELLS)

    def _ranked(self) -> list[tuple[float, int]]:
        """(value, lowest code of that value), ascending."""
        lowest_code: dict[float, int] = {}
        for code, value in enumerate(self.values):
            lowest_code.setdefault(value, code)
        return sorted(lowest_code.items())


@dataclass(frozen=True)
class ScaleFormat:
    """An 8-bit data type for double-quantized scales or optimizer state: 256 ascending values in [-1, 1].

    A code is the rank of its value, so `thresholds` alone encode. A format with fewer distinct values
    repeats its largest one; the repeats are never produced.
    """

    name: str
    values: tuple[float, ...]

    @property
    def thresholds(self) -> Tensor:
        """fp32 [255]: midpoints of neighbouring values, ascending, +inf between repeated values."""
        values = _float32(self.values)
        midpoints = (values[:-1] + values[1:]) / 2
        return torch.where(values[1:] > values[:-1], midpoints, torch.inf)


def _ranks_by_cell(name: str, occupied: Tensor, cells: int) -> Tensor:
    """uint8 [cells]: how many thresholds lie in lower cells; `occupied` are the cells of the thresholds."""
    if len(occupied.unique()) < len(occupied):
        raise ValueError(
            f"the thresholds of format {name!r} must lie in {len(occupied)} different cells "
            f"of {cells}; got cells {occupied.tolist()}"
        )
    return torch.bucketize(torch.arange(cells, device="cpu"), occupied).to(torch.uint8)


def _float32(values: Sequence[float]) -> Tensor:
    """On the CPU, whatever torch's default dtype and device are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def cell(normalized: Tensor) -> Tensor:
    """The cell of each fp32 value: round((CELLS - 1) * clamp(x / 2 + 1 / 2, 0, 1)), ties to even; int64.

    An fp32 sum, then a product that is rounded once, to an integer: two instructions on a device. Zero lies
    on the border of two cells, as the fp4 format has thresholds close to zero on both sides of it.
    """
    shifted = (normalized * 0.5 + 0.5).clamp(0, 1)
    return (shifted.double() * (CELLS - 1)).round().long()


def _signed(magnitudes: list[float]) -> tuple[float, ...]:
    """Codes with a sign bit on top: the eight magnitudes, then the same ones negated."""
    return tuple(magnitudes) + tuple(-m for m in magnitudes)


def _dynamic_map(signed: bool) -> tuple[float, ...]:
    """The dynamic 8-bit map (Dettmers et al. 2022, "8-bit Optimizers", section 1.3; unsigned: section 2.2).

    The number of leading zero bits chooses a decade, the remaining bits a linear fraction of it: decade
    10^(i-6) holds the midpoints of 2^i equal parts of [0.1, 1], or of twice as many where no bit is spent on
    the sign. Zero and one complete the map.
    """
    magnitudes = []
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32, device="cpu")
        magnitudes += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
    negative = [-m for m in magnitudes] if signed else []
    return tuple(sorted([*negative, 0.0, *magnitudes, 1.0]))


def _e4m3_map() -> tuple[float, ...]:
    """The finite values of the 8-bit float e4m3 (Micikevicius et al. 2022), divided by the largest."""
    bits = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
    finite = torch.unique(bits[bits.isfinite()]) / 448 + 0.0  # the sum turns -0 into +0
    return tuple(finite.tolist() + [1.0] * (256 - len(finite)))


_NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        # QLoRA, Appendix E: the quantiles of a normal distribution, with an exact zero.
        Format("nf4", _NF4_VALUES),
        # bitsandbytes' FP4: an E2M1 whose subnormal is 1/192 of the largest value in place of 1/12.
        Format("fp4", _signed([v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)])),
        # E2M1 as in the OCP microscaling specification, divided by its largest value 6.
        Format("e2m1", _signed([v / 6 for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])),
        # Three exponent bits, no mantissa; the smallest exponent encodes zero.
        Format("e3m0", _signed([0.0] + [2.0 ** (e - 7) for e in range(1, 8)])),
        # Symmetric integers in two's complement; -8 decodes but is never produced.
        Format("int4", tuple((code - 16 * (code > 7)) / 7 for code in range(16))),
    )
}
"""4-bit data types by name: the built-in ones, and those that `user_formats.register_format` adds."""

SCALE_FORMATS: dict[str, ScaleFormat] = {
    fmt.name: fmt
    for fmt in (ScaleFormat("dynamic8", _dynamic_map(True)), ScaleFormat("e4m3", _e4m3_map()))
}
"""8-bit data types for double quantization by name."""

_UNSIGNED_DYNAMIC8 = ScaleFormat("unsigned dynamic8", _dynamic_map(False))


def state_format(signed: bool) -> ScaleFormat:
    """The 8-bit data type of an optimizer state: signed for the mean of gradients, unsigned for that of squares."""
    return SCALE_FORMATS["dynamic8"] if signed else _UNSIGNED_DYNAMIC8


def state_cell(normalized: Tensor, signed: bool) -> Tensor:
    """The cell of each fp32 value of a state: int32, ascending with the value. That of a NaN means nothing.

    Thresholds lie as near as 2^-6 or 2^-7 of their size, over 22 powers of two. So a cell has the exponent, of 32
    from 2^-31 up, and as many bits of the mantissa; below, all is one cell.
    """
    bits = normalized.view(torch.int32)
    half = STATE_CELLS // 2 if signed else STATE_CELLS
    shift = 17 if signed else 16
    magnitude = (((bits & 0x7FFFFFFF) >> shift) - (96 << 23 >> shift)).clamp(0, half - 1)
    return torch.where(bits < 0, half - 1 - magnitude, half + magnitude) if signed else magnitude


def state_zero_code(signed: bool) -> int:
    """The code of zero, which a fresh 8-bit state is filled with."""
    return state_format(signed).values.index(0.0)


def state_tiles(numel: int) -> int:
    """Tiles that the state of a parameter of `numel` elements takes."""
    return (numel + STATE_TILE - 1) // STATE_TILE


def check_format(format: str) -> None:
    """Raise ValueError unless `format` names a 4-bit data type."""
    if format not in FORMATS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, or another name after "
            f"qlora.register_format(name, values); got {format!r}"
        )


def check_scale_format(scale_format: str) -> None:
    """Raise ValueError unless `scale_format` names an 8-bit data type."""
    if scale_format not in SCALE_FORMATS:
        allowed = ", ".join(SCALE_FORMATS)
        raise ValueError(f"scale_format must be one of {allowed}; got {scale_format!r}")


def check_blocksize(blocksize: int) -> None:
    """Raise ValueError unless `blocksize` is a power of two from 32 to 4096."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}; got {blocksize!r}")


def packed_bytes(numel: int) -> int:
    """Bytes that hold `numel` 4-bit codes: two a byte, an odd count rounded up."""
    return (numel + 1) // 2


def num_blocks(numel: int, blocksize: int) -> int:
    """Blocks over the flattened tensor; the last may be short."""
    return (numel + blocksize - 1) // blocksize


# Codebooks are needed on every call and never change, so each device gets one copy.
@cache
def codebook(format: str, device: torch.device) -> Tensor:
    """fp32 [16]: the value of each code."""
    return torch.tensor(FORMATS[format].values, dtype=torch.float32, device=device)


@cache
def thresholds(format: str, device: torch.device) -> Tensor:
    """fp32 [15]: see `Format.thresholds`."""
    return FORMATS[format].thresholds.to(device)


@cache
def rank_to_code(format: str, device: torch.device) -> Tensor:
    """uint8 [16]: see `Format.rank_to_code`."""
    return torch.tensor(FORMATS[format].rank_to_code, dtype=torch.uint8, device=device)


@cache
def cell_ranks(format: str, device: torch.device) -> Tensor:
    """uint8 [CELLS]: see `Format.cell_ranks`."""
    return FORMATS[format].cell_ranks.to(device)


@cache
def code_bytes(format: str, device: torch.device) -> Tensor | None:
    """uint8 [256]: two packed codes by the two packed ranks, or None if every code is its rank."""
    codes = torch.tensor(FORMATS[format].rank_to_code, dtype=torch.uint8, device="cpu")
    if codes.tolist() == list(range(16)):
        return None
    return (codes[:, None] << 4 | codes[None, :]).view(-1).to(device)


@cache
def scale_codebook(scale_format: str, device: torch.device) -> Tensor:
    """fp32 [256]: the value of each scale code."""
    return torch.tensor(SCALE_FORMATS[scale_format].values, dtype=torch.float32, device=device)


@cache
def scale_thresholds(scale_format: str, device: torch.device) -> Tensor:
    """fp32 [255]: see `ScaleFormat.thresholds`."""
    return SCALE_FORMATS[scale_format].thresholds.to(device)


@cache
def state_codebook(signed: bool, device: torch.device) -> Tensor:
    """fp32 [256]: the value of each code of an optimizer state."""
    return torch.tensor(state_format(signed).values, dtype=torch.float32, device=device)


@cache
def state_thresholds(signed: bool, device: torch.device) -> Tensor:
    """fp32 [255]: see `ScaleFormat.thresholds`."""
    return state_format(signed).thresholds.to(device)


@cache
def state_cell_ranks(signed: bool, device: torch.device) -> Tensor:
    """uint8 [STATE_CELLS]: the rank at the lower end of each cell, as in `Format.cell_ranks`."""
    fmt = state_format(signed)
    return _ranks_by_cell(fmt.name, state_cell(fmt.thresholds, signed), STATE_CELLS).to(device)
