"""Properties of the specification itself, and bitsandbytes as an independent oracle for its bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import reference
from qlora.kernels.formats import FORMATS, SCALE_FORMATS, codebook
from tests import strategies as qst

CPU = torch.device("cpu")
NF4_BOUND = 0.1519036  # half the widest gap of NF4, from -1 to -0.6962


def roundtrip(x: Tensor, format: str = "nf4", blocksize: int = 64, dtype=torch.float32) -> Tensor:
    packed, absmax = reference.quantize_4bit(x, format, blocksize)
    return reference.dequantize_4bit(
        packed, absmax, None, None, format, blocksize, "", list(x.shape), dtype
    )


def unpack(packed: Tensor, numel: int) -> list[int]:
    """Codes in order, written out by hand: the even element is the high nibble."""
    nibbles = [nibble for byte in packed.tolist() for nibble in (byte // 16, byte % 16)]
    return nibbles[:numel]


def expected_absmax(x: Tensor, blocksize: int) -> list[float]:
    flat = x.reshape(-1).float().abs().tolist()
    return [max(flat[i : i + blocksize]) for i in range(0, len(flat), blocksize)]


# --- Quantize and dequantize ------------------------------------------------------------------------


@given(qst.tensors(), qst.formats, qst.blocksizes)
def test_codes_are_the_nearest_value(x: Tensor, format: str, blocksize: int) -> None:
    packed, absmax = reference.quantize_4bit(x, format, blocksize)
    assert packed.shape == ((x.numel() + 1) // 2,)
    assert absmax.tolist() == expected_absmax(x, blocksize)
    if not x.numel():
        return
    scale = absmax.double().repeat_interleave(blocksize)[: x.numel()]
    normalized = torch.where(scale > 0, x.double() / scale, 0.0)
    values = codebook(format, CPU).double()
    error = (normalized - values[unpack(packed, x.numel())]).abs()
    nearest = (normalized[:, None] - values).abs().amin(dim=1)
    # In fp32 the normalized value may come down on the other side of a midpoint by two roundings.
    assert (error <= nearest + 2**-22).all()


@given(qst.tensors(), qst.blocksizes)
def test_error_bound_of_nf4(x: Tensor, blocksize: int) -> None:
    _, absmax = reference.quantize_4bit(x, "nf4", blocksize)
    scale = absmax.double().repeat_interleave(blocksize)[: x.numel()]
    error = (roundtrip(x, "nf4", blocksize).double() - x.double()).abs()
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    assert (error <= NF4_BOUND * (1 + 2**-22) * scale + smallest).all()


@given(qst.tensors(), qst.formats, qst.blocksizes)
def test_requantization_is_idempotent(x: Tensor, format: str, blocksize: int) -> None:
    once = roundtrip(x, format, blocksize)
    # Where fp32 itself runs out of steps, values of neighbouring codes can coincide.
    assume(not once.numel() or once.abs().max() >= 1e-36)
    assert torch.equal(roundtrip(once, format, blocksize), once)


@given(qst.tensors(torch.float32), qst.formats, st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result(x: Tensor, format: str, power: int) -> None:
    scaled = x * 2.0**power
    assume(torch.equal(scaled / 2.0**power, x) and scaled.isfinite().all())
    packed, absmax = reference.quantize_4bit(x, format, 64)
    packed_scaled, absmax_scaled = reference.quantize_4bit(scaled, format, 64)
    assert torch.equal(packed, packed_scaled)
    assert torch.equal(absmax * 2.0**power, absmax_scaled)


@given(qst.tensors(), qst.formats)
def test_signs_and_zeros_are_exact(x: Tensor, format: str) -> None:
    result = roundtrip(x, format)
    assert (result[x == 0] == 0).all()
    assert (result * x.float().sign() >= 0).all()


@given(qst.formats, qst.seeds)
def test_larger_inputs_never_get_smaller_values(format: str, seed: int) -> None:
    x = torch.randn(63, generator=torch.Generator().manual_seed(seed)).sort().values
    x = torch.cat([x, x.abs().max()[None] * 1.5])
    result = roundtrip(x, format)
    assert (result[1:] >= result[:-1]).all()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_ties_take_the_lower_value(format: str) -> None:
    """At each midpoint exactly, and one fp32 step to either side of it."""
    fmt = FORMATS[format]
    thresholds = fmt.thresholds[fmt.thresholds.isfinite()]
    thresholds = thresholds[thresholds.abs() < 1]
    values = torch.tensor(sorted({v + 0.0 for v in fmt.values}))
    below, above = values[values < thresholds.max()], values[values > thresholds.min()]
    below = below[-len(thresholds) :]
    for direction, expected in ((-2.0, below), (0.0, below), (2.0, above)):
        x = thresholds if direction == 0 else torch.nextafter(thresholds, torch.tensor(direction))
        x = torch.cat([torch.ones(1), x])  # the block's absmax is 1, so x is its own normal form
        assert torch.equal(roundtrip(x, format)[1:], expected)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_nibble_order_and_odd_tail(format: str) -> None:
    values = FORMATS[format].values
    one = max(range(16), key=lambda code: values[code])
    packed, _ = reference.quantize_4bit(torch.tensor([1.0, 0.0, 1.0]), format, 32)
    zero = min(code for code in range(16) if values[code] == 0)
    assert packed.tolist() == [one << 4 | zero, one << 4]


@given(qst.formats, st.lists(st.integers(0, 15), max_size=33))
def test_packing_round_trip(format: str, codes: list[int]) -> None:
    values = FORMATS[format].values
    emitted = [c for c in codes if abs(values[c]) <= 1 and c == values.index(values[c])]
    x = torch.tensor([1.0] + [values[c] for c in emitted])
    packed, _ = reference.quantize_4bit(x, format, 64)
    assert unpack(packed, x.numel())[1:] == emitted


@pytest.mark.parametrize("magnitude", [1e-44, 3e-39, 1e-38, 1e-30, 1e30, 3.4e38])
def test_extreme_magnitudes(magnitude: float) -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 0.5]) * magnitude
    result = roundtrip(x)
    assert torch.equal(result[:3], x[:3])
    assert result[3] > 0
    assert result.isfinite().all()


def test_non_contiguous_input_is_read_in_logical_order() -> None:
    x = torch.randn(40, 30)
    assert torch.equal(roundtrip(x.T), roundtrip(x.T.contiguous()))
    assert torch.equal(roundtrip(x[::2, ::3]), roundtrip(x[::2, ::3].contiguous()))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("dtype", qst.DTYPES)
def test_bytes_are_those_of_bitsandbytes(format: str, blocksize: int, dtype: torch.dtype) -> None:
    """Codes and scales, over sizes with short last blocks. FP4's two zeros, codes 0 and 8, count as one."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(blocksize)
    for shape in ((1,), (3,), (64,), (65, 3), (100, 101), (128, 256)):
        x = torch.randn(shape, generator=generator).to(dtype)
        theirs, state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type=format)
        packed, absmax = reference.quantize_4bit(x, format, blocksize)
        assert torch.equal(absmax, state.absmax)
        ours, theirs = unpack(packed, x.numel()), unpack(theirs.flatten(), x.numel())
        if format == "fp4":
            theirs = [0 if code == 8 else code for code in theirs]
        # Their short last block is divided by absmax, all others are multiplied by its reciprocal: there
        # an input may come down on the other side of a midpoint, if it is one rounding away from it.
        full = x.numel() // blocksize * blocksize
        for i in [i for i in range(x.numel()) if ours[i] != theirs[i]]:
            normalized = x.flatten()[i].float() / absmax[-1]
            distance = (normalized - FORMATS[format].thresholds).abs().min()
            assert i >= full
            assert distance <= 2**-23


# --- Double quantization ----------------------------------------------------------------------------


@given(st.integers(0, 1100), qst.scale_formats, qst.seeds)
def test_double_quantization_takes_the_nearest_value(blocks: int, name: str, seed: int) -> None:
    absmax = torch.randn(blocks, generator=torch.Generator().manual_seed(seed)).abs()
    codes, nested_absmax, offset = reference.quantize_absmax(absmax, name)
    assert codes.shape == (blocks,)
    assert nested_absmax.shape == ((blocks + 255) // 256,)
    if not blocks:
        return
    assert offset == absmax.double().mean().float()
    centred = absmax - offset
    assert nested_absmax.tolist() == expected_absmax(centred, 256)
    values = torch.tensor(SCALE_FORMATS[name].values, dtype=torch.float64)
    scale = nested_absmax.double().repeat_interleave(256)[:blocks]
    error = (centred.double() - values[codes.long()] * scale).abs()
    nearest = (centred.double()[:, None] - values * scale[:, None]).abs().amin(dim=1)
    assert (error <= nearest + scale * 2**-22).all()
    decoded = reference.dequantize_absmax(codes, nested_absmax, offset, name)
    step = torch.tensor(SCALE_FORMATS[name].values, dtype=torch.float32)[codes.long()]
    expected = step * nested_absmax.repeat_interleave(256)[:blocks] + offset
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize(("name", "bound"), [("dynamic8", 0.0017), ("e4m3", 0.0030)])
def test_double_quantized_scales_of_normal_weights(name: str, bound: float) -> None:
    """Mean relative error of absmax on normal weights: 0.161 % and 0.285 % (4096 x 4096)."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    _, absmax = reference.quantize_4bit(x, "nf4", 64)
    decoded = reference.dequantize_absmax(*reference.quantize_absmax(absmax, name), name)
    assert 0.9 * bound < ((decoded - absmax) / absmax).abs().mean() < bound


def test_nested_scales_decode_as_bitsandbytes_decodes_them() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = reference.dequantize_4bit(
        packed.flatten(),
        state.absmax,
        state.state2.absmax,
        state.offset,
        "nf4",
        64,
        "dynamic8",
        [512, 96],
        torch.float32,
    )
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    values = codebook("nf4", CPU)[unpack(packed.flatten(), x.numel())]
    assert torch.equal(ours.flatten(), (values.view(-1, 64) * absmax[:, None]).flatten())


def test_an_all_zero_weight_stays_zero_when_double_quantized() -> None:
    packed, absmax = reference.quantize_4bit(torch.zeros(300), "nf4", 64)
    for name in SCALE_FORMATS:
        scales = reference.quantize_absmax(absmax, name)
        result = reference.dequantize_4bit(packed, *scales, "nf4", 64, name, [300], torch.float32)
        assert torch.equal(result, torch.zeros(300))


# --- Known error figures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocksize", "mae"),
    [(32, 0.067746), (64, 0.072798), (128, 0.076831), (256, 0.080337), (4096, 0.092547)],
)
def test_mean_absolute_error_on_normal_data(blocksize: int, mae: float) -> None:
    """Published figures of NF4 on N(0, 1).

    A block's error goes with its absmax, which spreads by less than a fifth from block to block.
    """
    draws = 2**22
    x = torch.randn(draws, generator=torch.Generator().manual_seed(1))
    four_sigma = 4 * 0.2 * (blocksize / draws) ** 0.5
    assert (roundtrip(x, "nf4", blocksize) - x).abs().mean() == pytest.approx(mae, rel=four_sigma)


def test_nf4_has_the_least_error_on_normal_data() -> None:
    """QLoRA's claim for its data type, and the order of the others at block size 64."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(2))
    mse = {name: (roundtrip(x, name) - x).square().mean().item() for name in FORMATS}
    assert sorted(mse, key=mse.__getitem__) == ["nf4", "e2m1", "int4", "fp4", "e3m0"]
    assert mse["nf4"] == pytest.approx(0.00846, rel=0.01)


# --- The linear layer and dropout -------------------------------------------------------------------


def _layer(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    n, k, r, m = 6, 64, 3, 5
    weight = torch.randn(n, k, generator=generator)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 32)
    scales = reference.quantize_absmax(absmax, "dynamic8")
    dense = reference.dequantize_4bit(packed, *scales, "nf4", 32, "dynamic8", [n, k], torch.float64)
    draw = [torch.randn(s, generator=generator).double() for s in ((m, k), (n,), (r, k), (n, r))]
    return (packed, *scales), dense, [tensor.requires_grad_() for tensor in draw]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layer_and_its_four_gradients_equal_autograd(dropout: float) -> None:
    quantized, dense, (x, bias, lora_a, lora_b) = _layer()
    rng = torch.tensor([3, 4]) if dropout else None
    keep = reference.dropout_mask(torch.tensor([3, 4]), *x.shape, dropout)
    mask = keep.double() / (1 - dropout)
    arguments = (rng, 0.5, dropout, "nf4", 32, "dynamic8")
    y, h = reference.qlora_forward(x, *quantized, bias, lora_a, lora_b, *arguments)
    expected = x @ dense.T + bias + 0.5 * (x * mask) @ lora_a.T @ lora_b.T
    torch.testing.assert_close(y, expected)

    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).double()
    expected_grads = torch.autograd.grad(expected, (x, lora_a, lora_b, bias), grad_y)
    g = reference.lora_project(grad_y, lora_b.T, None, 0.0)
    grads = (
        reference.qlora_grad_x(grad_y, g, *quantized, lora_a, *arguments),
        reference.lora_grad(g, x, rng, 0.5, dropout),
        reference.lora_grad(grad_y, h, None, 0.5, 0.0),
        grad_y.sum(0),
    )
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted)


def _hash_by_hand(x: int) -> int:
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_dropout_mask_follows_its_definition() -> None:
    seed, offset, p = 2**31 - 1, 12345, 0.3
    mask = reference.dropout_mask(torch.tensor([seed, offset]), 7, 9, p)
    for row, column in itertools.product(range(7), range(9)):
        key = _hash_by_hand(_hash_by_hand(_hash_by_hand(seed) ^ offset) ^ row)
        assert mask[row, column] == ((_hash_by_hand(key ^ column) >> 8) / 2**24 >= p - 2**-24)


def test_dropout_mask_is_fair_and_uncorrelated() -> None:
    """Keep rates per row and column as of independent draws; neighbours and calls are uncorrelated."""
    m, k, p = 2048, 1024, 0.1
    keep = reference.dropout_mask(torch.tensor([1, 2]), m, k, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / (m * k) ** 0.5
    assert keep.mean(0).std() == pytest.approx(deviation / m**0.5, rel=0.15)
    assert keep.mean(1).std() == pytest.approx(deviation / k**0.5, rel=0.15)
    other = reference.dropout_mask(torch.tensor([1, 3]), m, k, p).double()
    pairs = [(keep[1:], keep[:-1]), (keep[:, 1:], keep[:, :-1]), (keep, other)]
    for left, right in pairs:
        covariance = ((left - left.mean()) * (right - right.mean())).mean()
        assert abs(covariance) < 5 * deviation**2 / (m * k) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.5, 0.999])
def test_dropout_probability_extremes(p: float) -> None:
    keep = reference.dropout_mask(torch.tensor([5, 6]), 256, 256, p)
    assert keep.double().mean().item() == pytest.approx(1 - p, abs=0.01)
    assert p > 0 or keep.all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    blocks = torch.randn(64, 64)
    expected = reference.normalize(blocks)
    torch.set_default_dtype(dtype)
    try:
        normalized = reference.normalize(blocks)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(normalized, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
