"""bitsandbytes' tensors of a weight and ours, both directions, against bitsandbytes itself; damaged ones are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora import QLoRAConfig, QLoRALinear, dequantize_4bit, quantize_4bit, quantize_model
from qlora.bnb_format import STORAGES, from_bitsandbytes, to_bitsandbytes
from qlora.kernels.formats import codebook
from qlora.quantized import QuantizedTensor
from tests import strategies as own

CPU = torch.device("cpu")
sizes = st.sampled_from([1, 2, 3, 5, 8, 40, 63, 64, 65, 100, 129])
types = st.sampled_from(["nf4", "fp4"])
storages = st.sampled_from(STORAGES)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """[n, k], odd sizes among them; some blocks zero, some large."""
    generator = torch.Generator().manual_seed(draw(own.seeds))
    weight = torch.randn(draw(sizes), draw(sizes), generator=generator)
    weight *= draw(st.sampled_from([1.0, 0.02, 1000.0]))
    weight[: draw(st.integers(0, 2))] = 0
    return weight.to(draw(own.dtypes))


def theirs(
    weight: Tensor,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """What bitsandbytes makes of a weight, as in its state dicts."""
    import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=double_quant,
        quant_type=format,
        quant_storage=storage,
    )
    parts = state.as_dict(packed=True)
    return {"weight": packed} | {f"weight.{part}": tensor for part, tensor in parts.items()}


def decoded_by_them(tensors: dict[str, Tensor]) -> Tensor:
    """The plain formula on what bitsandbytes reads; its own decoding errs where a block ends within a row."""
    from bitsandbytes import functional

    parts = {key.removeprefix("weight."): tensor.clone() for key, tensor in tensors.items()}
    packed = parts.pop("weight").view(torch.uint8).view(-1)
    state = functional.QuantState.from_dict(parts, CPU)
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()] * scales).view(state.shape).to(state.dtype)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert tensor.shape == right[key].shape, key
        assert torch.equal(as_bytes(tensor), as_bytes(right[key])), key


def as_bytes(tensor: Tensor) -> Tensor:
    """So that -0 differs from 0, and a NaN equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@given(weights(), types, own.blocksizes, st.booleans(), storages)
def test_theirs_are_read_and_written_again_bit_for_bit(
    weight: Tensor, format: str, blocksize: int, double_quant: bool, storage: torch.dtype
) -> None:
    assume((weight.numel() + 1) // 2 % storage.itemsize == 0)  # theirs fails otherwise
    given = theirs(weight, format, blocksize, double_quant, storage)
    q = from_bitsandbytes(given)
    assert (q.shape, q.dtype) == (weight.shape, weight.dtype)
    assert (q.format, q.blocksize, bool(q.scale_format)) == (format, blocksize, double_quant)
    assert torch.equal(dequantize_4bit(q), decoded_by_them(given))
    assert_equal(to_bitsandbytes(q, storage), given)


@given(weights(), types, own.blocksizes, st.booleans(), storages)
def test_ours_are_read_by_them_and_by_us(
    weight: Tensor, format: str, blocksize: int, double_quant: bool, storage: torch.dtype
) -> None:
    q = quantize_4bit(weight, format, blocksize, double_quant)
    written = to_bitsandbytes(q, storage)
    assert torch.equal(decoded_by_them(written), dequantize_4bit(q))
    assert_same(from_bitsandbytes(written), q)
    assert_equal(to_bitsandbytes(from_bitsandbytes(written), storage), written)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, name
            assert value.shape == other.shape, name
            assert torch.equal(as_bytes(value), as_bytes(other)), name
        else:
            assert value == other, name


@pytest.mark.parametrize("storage", STORAGES)
def test_an_odd_count_is_filled_up_with_zeros(storage: torch.dtype) -> None:
    q = quantize_4bit(torch.randn(3, 3))  # 5 bytes
    stored = to_bitsandbytes(q, storage)["weight"]
    size = -(-5 // storage.itemsize) * storage.itemsize
    assert (stored.dtype, stored.shape) == (storage, (size // storage.itemsize, 1))
    assert as_bytes(stored).tolist() == q.packed.tolist() + [0] * (size - 5)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_the_offset_is_fp32_whatever_the_default_dtype_is() -> None:
    """Theirs rounds it, so that all weights of the layer change."""
    weight = torch.randn(8, 64)
    given = theirs(weight)
    expected = from_bitsandbytes(given)
    with default_dtype(torch.bfloat16):
        q = from_bitsandbytes(given)
        written = to_bitsandbytes(q)
    assert_same(q, expected)
    assert_equal(written, given)
    assert q.nested_offset != q.nested_offset.bfloat16(), "one that 16 bits cannot hold"
    assert not torch.equal(
        dequantize_4bit(replace(q, nested_offset=q.nested_offset.bfloat16().float())),
        dequantize_4bit(q),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "e2m1"},
            "format must be nf4 or fp4 for bitsandbytes; got 'e2m1': quantize with",
        ),
        ({"format": "int4"}, "or keep qlora's own layout"),
        ({"scale_format": "e4m3"}, "scale_format must be dynamic8 for bitsandbytes; got 'e4m3'"),
    ],
    ids=str,
)
def test_what_they_have_no_format_for_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        to_bitsandbytes(quantize_4bit(torch.randn(4, 64), **settings))


def test_another_storage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"storage must be one of \(torch.uint8, .*got torch.int8"):
        to_bitsandbytes(quantize_4bit(torch.randn(4, 64)), torch.int8)


# --- State dicts ------------------------------------------------------------------------------------


def their_model(double_quant: bool = True, format: str = "nf4", bias: bool = True) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    settings = {"quant_type": format, "compress_statistics": double_quant, "bias": bias}
    layers = [nn.Embedding(10, 64), Linear4bit(64, 65, **settings), nn.LayerNorm(65)]
    return nn.Sequential(*layers, Linear4bit(65, 7, **settings)).to("cpu")


def our_model(bias: bool = True, **settings: Any) -> nn.Module:
    layers = [nn.Embedding(10, 64), nn.Linear(64, 65, bias), nn.LayerNorm(65)]
    model = nn.Sequential(*layers, nn.Linear(65, 7, bias))
    quantize_model(model, QLoRAConfig(target_modules=None, **settings))
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_their_state_dict_loads_strictly(format: str, double_quant: bool, bias: bool) -> None:
    given = their_model(double_quant, format, bias).state_dict()
    before = dict(given)
    ours = our_model(bias, format=format, double_quant=double_quant)
    assert ours.load_state_dict(given, strict=True) == ([], [])
    assert given.keys() == before.keys(), "the caller's is as it was"
    assert all(given[key] is before[key] for key in before)
    for name, layer in ours.named_modules():
        if isinstance(layer, QLoRALinear):
            prefix = f"{name}.weight"
            assert_equal(
                to_bitsandbytes(layer.weight, name=prefix),
                {key: tensor for key, tensor in given.items() if key.startswith(prefix)},
            )
            if bias:
                assert torch.equal(layer.bias, given[f"{name}.bias"])
    assert torch.equal(ours[0].weight, given["0.weight"])
    again = our_model(bias, format=format, double_quant=double_quant)
    again.load_state_dict(ours.state_dict(), strict=True)
    x = torch.arange(10)
    assert torch.equal(again(x), ours(x))


def test_one_layer_loads_as_well_and_an_adapter_stays() -> None:
    given = their_model()[1].state_dict()
    layer = QLoRALinear.from_linear(nn.Linear(64, 65), QLoRAConfig(rank=2))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \S*lora_a"):
        layer.load_state_dict(given)
    lora_a = layer.lora_a.clone()
    missing, unexpected = layer.load_state_dict(given, strict=False)
    assert all("lora_" in key for key in missing)
    assert not unexpected
    assert torch.equal(layer.lora_a, lora_a)
    assert_equal(to_bitsandbytes(layer.weight), {k: v for k, v in given.items() if k != "bias"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "fp4"}, "1.weight: must have format 'fp4' for this layer; got 'nf4'"),
        ({"blocksize": 128}, "1.weight: must have blocksize 128 for this layer; got 64"),
        ({"double_quant": False}, "1.weight: must have scale_format '' for this layer; got 'dyn"),
        ({"scale_format": "e4m3"}, "1.weight: must have scale_format 'e4m3' for this layer"),
    ],
    ids=str,
)
def test_another_base_than_the_layers_is_refused(settings: dict[str, Any], message: str) -> None:
    ours = our_model(**settings)
    before = {key: tensor.clone() for key, tensor in ours[1].state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        ours.load_state_dict(their_model().state_dict())
    assert_equal(before, ours[1].state_dict())


def test_another_shape_and_eight_bits_are_refused() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(65, 64), QLoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"weight: must have shape \(64, 65\) for this layer; got"):
        layer.load_state_dict(their_model()[1].state_dict())
    eight = {"weight": torch.ones(64, 65, dtype=torch.int8), "SCB": torch.ones(64)}
    with pytest.raises(ValueError, match=r"^SCB: belongs to a weight in 8 bits .* load a 16-bit"):
        layer.load_state_dict(eight)
    with pytest.raises(
        RuntimeError, match="Missing key"
    ):  # torch's: a dense weight is no base in 4 bits
        layer.load_state_dict({"weight": torch.ones(64, 65)})


# --- Damage -----------------------------------------------------------------------------------------

STATE = "weight.quant_state.bitsandbytes__nf4"


def whole(double_quant: bool = True) -> dict[str, Tensor]:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    return to_bitsandbytes(quantize_4bit(weight, blocksize=32, double_quant=double_quant))


def refusal(tensors: dict[str, Tensor]) -> str:
    with pytest.raises(ValueError, match=r"^weight") as caught:
        from_bitsandbytes(tensors)
    return str(caught.value)


@pytest.mark.parametrize("double_quant", [True, False])
def test_each_missing_tensor_is_named(double_quant: bool) -> None:
    for key in (tensors := whole(double_quant)):
        message = refusal({k: t for k, t in tensors.items() if k != key})
        assert message.startswith("weight"), message
        assert key in message


@given(st.data(), st.booleans())
def test_each_wrong_size_and_dtype_is_named(data: st.DataObject, double_quant: bool) -> None:
    tensors = whole(double_quant)
    key = data.draw(st.sampled_from(sorted(tensors)))
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: t[:-1],
        lambda t: torch.cat([t, t[:1]]),
        lambda t: t.unsqueeze(0),
        lambda t: t.double(),
        lambda t: t.to(torch.int8),
        lambda t: t.new_zeros(0),
    ]
    change = data.draw(st.sampled_from(changes))
    assert refusal(tensors | {key: change(tensors[key])}).startswith(f"{key}: ")


@pytest.mark.parametrize("key", ["weight.quant_map", "weight.nested_quant_map"])
def test_another_codebook_is_refused(key: str) -> None:
    tensors = whole()
    tensors[key][3] += 1e-6
    assert (
        refusal(tensors)
        == f"{key}: must be bitsandbytes' table of {len(tensors[key])} values; got another"
    )
    tensors[key][3] = torch.nan
    assert refusal(tensors).startswith(f"{key}: must be bitsandbytes' table")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_refused(double_quant: bool, value: float) -> None:
    quantized = quantize_4bit(torch.randn(8, 64), "nf4", 64, double_quant)
    tensors = to_bitsandbytes(quantized)
    key = "weight.nested_absmax" if double_quant else "weight.absmax"
    tensors[key][0] = value
    with pytest.raises(ValueError, match=f"{key}: must be finite"):
        from_bitsandbytes(tensors)


def test_other_tensors_beside_the_known_are_refused() -> None:
    assert refusal(whole() | {"weight.scale": torch.ones(1)}).startswith(
        "weight.scale: not a tensor"
    )
    fp4 = {"weight.quant_state.bitsandbytes__fp4": whole()[STATE]}
    assert refusal(whole() | fp4).startswith("weight: needs one of weight.quant_state.bitsandbytes")
    rest = {key: tensor for key, tensor in whole().items() if key != STATE}
    assert refusal(rest | fp4).endswith("quant_type must be as in the key; got 'nf4'")
    assert "got weight.quant_state.bitsandbytes__af4" in refusal(
        rest | {"weight.quant_state.bitsandbytes__af4": whole()[STATE]}
    )
    assert refusal(whole(False) | {"weight.nested_absmax": torch.ones(1)}).startswith(
        "weight.nested_absmax: not a tensor of weight"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "af4"}, "quant_type must be one of nf4, fp4; got 'af4'"),
        ({"quant_type": "fp4"}, "quant_type must be as in the key; got 'fp4'"),
        ({"quant_type": None}, "quant_type is missing"),
        ({"blocksize": 48}, "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ({"blocksize": 8192}, "blocksize must be one of"),
        ({"blocksize": 64.0}, "blocksize must be of type int; got 64.0"),
        ({"blocksize": True}, "blocksize must be of type int; got True"),
        ({"blocksize": None}, "blocksize is missing"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16; got 'float64'"),
        ({"dtype": ["float32"]}, "dtype must be of type str"),
        ({"shape": [40, 100, -1]}, "shape must hold sizes; got [40, 100, -1]"),
        ({"shape": ["40", 100]}, "shape must hold sizes"),
        ({"shape": [2**70]}, "shape must hold sizes"),
        ({"shape": 4000}, "shape must be of type list; got 4000"),
        ({"shape": None}, "shape is missing"),
        ({"nested_blocksize": 128}, "nested_blocksize must be one of 256; got 128"),
        ({"nested_dtype": "float16"}, "nested_dtype must be one of float32; got 'float16'"),
        ({"nested_dtype": None}, "nested_dtype is missing"),
        ({"nested_offset": "0.1"}, "nested_offset must be of type float; got '0.1'"),
        ({"nested_offset": None}, "nested_offset is missing"),
        ({"nested_offset": float("nan")}, "nested_offset must be finite; got nan"),
        ({"nested_offset": 1e39}, "nested_offset must be finite; got 1e+39"),
        ({"nested_offset": 10**400}, "nested_offset must be finite"),
        ({"colour": "red"}, "has an unknown field 'colour'"),
    ],
    ids=str,
)
def test_each_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    state = json.loads(bytes(whole()[STATE].tolist())) | changes
    text = json.dumps({k: v for k, v in state.items() if v is not None})
    said = refusal(whole() | {STATE: encoded(text)})
    assert said.startswith(f"{STATE}: ")
    assert message in said


def encoded(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_another_shape_than_the_tensors_is_named() -> None:
    state = json.loads(bytes(whole()[STATE].tolist())) | {"shape": [40, 101]}
    assert refusal(whole() | {STATE: encoded(json.dumps(state))}).startswith(
        "weight.absmax: must have shape"
    )
    state["shape"] = [40, 99, 1]
    said = refusal(whole() | {STATE: encoded(json.dumps(state))})
    assert said.startswith("weight.absmax: must have shape (124,); got (125,)")
    state["shape"] = [3999]
    assert_same(
        from_bitsandbytes(whole() | {STATE: encoded(json.dumps(state))}),
        replace(from_bitsandbytes(whole()), shape=torch.Size([3999])),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, '{"quant_type": }'], ids=len)
def test_what_is_no_json_object_is_named(text: str) -> None:
    assert refusal(whole() | {STATE: encoded(text)}).startswith(f"{STATE}: ")


@given(st.data())
def test_damaged_bytes_of_the_state_never_go_unseen_as_another_error(data: st.DataObject) -> None:
    tensors = whole()
    state = tensors[STATE].clone()
    state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    q = None
    with suppress(ValueError):
        q = from_bitsandbytes(tensors | {STATE: state})
    if q is not None:  # a digit of the offset, say
        assert (q.shape, q.blocksize, q.format) == ((40, 100), 32, "nf4")


def test_the_codebooks_are_theirs() -> None:
    from bitsandbytes import functional

    for format in ("nf4", "fp4"):
        assert torch.equal(functional.get_4bit_type(format, CPU), codebook(format, CPU))
