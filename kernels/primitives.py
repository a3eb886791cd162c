"""Device functions that every kernel shares: exact casts, products, and the block-wise codec.

Triton's interpreter (TRITON_INTERPRET=1) is where the kernels are tested without a GPU, and it differs from
hardware in three ways: a cast to bfloat16 truncates where hardware rounds to nearest even, `tl.dot`
multiplies the raw bit patterns of bfloat16, and a minimum or maximum keeps a NaN. `to_float32`, `round_to`,
`dot` and `saturate` take a correct way around under the constant INTERPRETED; compiled, they are what their
names say.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def to_float32(x):
    """x as fp32, exactly. bfloat16 is shifted: a compiled cast takes two instructions for every other element."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x rounded to `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32; fp32 operands are multiplied as such, not in tf32."""
    if INTERPRETED:
        a, b = to_float32(a), to_float32(b)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def low_rank_tile(
    left_ptrs,
    stride_left,
    left_mask,
    right_ptrs,
    stride_right,
    right_mask,
    r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A product over the rank in fp32 [ROWS, COLUMNS]: rows of [*, r] at left_ptrs [ROWS, 1], columns of [r, *]
    at right_ptrs [1, COLUMNS]; the strides are those along the rank.
    """
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, r, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        left = tl.load(
            left_ptrs + rank[None, :] * stride_left,
            mask=left_mask & (rank[None, :] < r),
            other=0.0,
        )
        right = tl.load(
            right_ptrs + rank[:, None] * stride_right,
            mask=right_mask & (rank[:, None] < r),
            other=0.0,
        )
        acc = dot(left, right, acc)
    return acc


@triton.jit
def elements_left(total, tile, SIZE: tl.constexpr):
    """How many of the SIZE elements of tile number `tile`, an int64, lie within the first `total`: int32.

    So that masks are compared in 32 bits, which takes half the instructions.
    """
    return tl.minimum(total - tile * SIZE, SIZE).to(tl.int32)


@triton.jit
def _nan_maximum(a, b):
    """The larger of two values, NaN if either is: by default a device's maximum drops a NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normalize(x):
    """Scale each block of x [parts, blocks, width] into [-1, 1]: (x * (1 / absmax), absmax [blocks]).

    QLoRA, section 2, equation 1. The division is IEEE's. A tiny absmax, whose reciprocal would overflow, is
    lifted by a power of two first, together with its block; a block of zeros is multiplied by 1 / inf = 0. A
    NaN survives in its block's absmax, where the caller looks for it.
    """
    absmax = tl.reduce(tl.reduce(tl.abs(x), 0, _nan_maximum), 1, _nan_maximum)
    lift = tl.where(absmax < 2.0**-100, 2.0**64, 1.0)
    divisor = tl.where(absmax > 0, absmax * lift, float("inf"))
    inverse = tl.math.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)
    return x * lift[None, :, None] * inverse[None, :, None], absmax


@triton.jit
def saturate(x):
    """x clamped to [0, 1], a NaN to 0: on a device a modifier of the instruction that makes x."""
    if INTERPRETED:
        x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def count_below(x, thresholds_ptr, LEVELS: tl.constexpr):
    """For each element of x, how many of the 2^LEVELS - 1 ascending thresholds are strictly below it.

    A binary search, for thresholds as uneven as those of the 8-bit formats: 255 entries stay in the
    first-level cache.
    """
    rank = tl.zeros(x.shape, tl.int32)
    for level in tl.static_range(LEVELS):
        step = 1 << (LEVELS - 1 - level)
        rank += tl.where(x > tl.load(thresholds_ptr + rank + (step - 1)), step, 0)
    return rank
