"""The counter-based dropout mask on the device: bit for bit `reference.dropout_mask`.

Dropout acts on the adapter's input only (QLoRA, section 4). An element's fate is a hash of (seed, offset,
row, column), so forward and backward agree in any tiling, and no mask is stored.
"""

import triton
import triton.language as tl


@triton.jit
def hash_u32(x):
    """Mix 32 bits (Wellons' lowbias32 constants)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_key(rng_ptr):
    """The key of one call from its (seed, offset), int64 [2] in device memory."""
    seed = tl.load(rng_ptr).to(tl.uint32)
    offset = tl.load(rng_ptr + 1).to(tl.uint32)
    return hash_u32(hash_u32(seed) ^ offset)


@triton.jit
def keep_mask(key, rows, columns, threshold):
    """True where the element at (rows, columns), broadcast together, is kept.

    `threshold` is the dropout probability times 2^24: the hash's upper 24 bits are compared with it.
    """
    row_key = hash_u32(key ^ rows.to(tl.uint32))
    return (hash_u32(row_key ^ columns.to(tl.uint32)) >> 8) >= threshold


def dropout_arguments(dropout: float) -> tuple[int, float]:
    """A kernel's two scalars: the threshold of `keep_mask`, and what kept values are multiplied by."""
    return int(dropout * 2**24), 1 / (1 - dropout)
