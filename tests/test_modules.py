"""`QLoRALinear` and `LoRALinear` as modules: made, moved, copied, saved, compiled, switched and merged."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qlora import LoRALinear, QLoRAConfig, QLoRALinear, dequantize_4bit, quantize_4bit
from qlora.lora_layer import LoRALayer
from qlora.model_parts import is_conv1d

N, K, RANK = 24, 40, 4
KINDS = {"4-bit": QLoRALinear, "dense": LoRALinear}
SCALES = {
    "double": {},
    "fp32": {"double_quant": False},
    "e4m3, int4": {"scale_format": "e4m3", "format": "int4"},
}


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"rank": RANK, "alpha": 8, "blocksize": 32} | settings)


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias, dtype=dtype)


def conv1d() -> nn.Module:
    """GPT-2's linear layer, whose weight is [k, n]."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(N, K)
    nn.init.normal_(layer.bias)
    return layer


def trained(layer: LoRALayer) -> LoRALayer:
    """With an adapter that does something: a new one's B is zero."""
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_b)
    return layer


def quantized(bias: bool = True, **settings: Any) -> QLoRALinear:
    return trained(QLoRALinear.from_linear(linear(bias), config(**settings)))


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(leading or (5,)), K, generator=generator).to(dtype)


# --- Made from a linear layer -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "make", [linear, lambda: linear(bias=False), conv1d], ids=["bias", "no bias", "conv1d"]
)
def test_from_linear(kind: str, make: Callable[[], nn.Module]) -> None:
    base = make()
    before = [p.clone() for p in base.parameters()]
    layer = KINDS[kind].from_linear(base, config(dropout=0.1))
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))
    assert (layer.in_features, layer.out_features, layer.rank) == (K, N, RANK)
    assert (layer.scaling, layer.dropout, layer.base_dtype) == (2.0, 0.1, torch.float32)
    assert layer.fan_in_fan_out == is_conv1d(base)
    assert layer.lora_a.shape == (RANK, K)
    assert layer.lora_b.shape == (N, RANK)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"adapters.default.lora_a", "adapters.default.lora_b"}
    assert (layer.bias is None) == (base.bias is None)


@pytest.mark.parametrize(
    "make", [linear, lambda: linear(bias=False), conv1d], ids=["bias", "no bias", "conv1d"]
)
def test_a_new_adapter_changes_nothing(make: Callable[[], nn.Module]) -> None:
    """At first the layer is its base: the linear layer with the weight that its 4 bits stand for."""
    base = make()
    x = inputs(2, 3)
    assert torch.equal(LoRALinear.from_linear(base, config())(x), F.linear(x, *_dense(base)))
    layer = QLoRALinear.from_linear(base, config())
    weight, bias = _dense(base)
    assert torch.equal(layer.base_weight(), dequantize_4bit(quantize_4bit(weight, blocksize=32)))
    torch.testing.assert_close(layer(x), F.linear(x, layer.base_weight(), bias))
    error = (layer.base_weight() - weight).norm() / weight.norm()
    assert error < 0.12  # NF4 on uniform or normal weights


def _dense(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    return (base.weight.mT if is_conv1d(base) else base.weight), base.bias


def test_the_adapter_starts_as_in_the_paper() -> None:
    """LoRA, section 4.1: A random, B zero; uniform within 1 / sqrt(k) as in LoRA's code."""
    torch.manual_seed(0)
    layer = QLoRALinear.from_linear(nn.Linear(400, 16), QLoRAConfig(rank=64))
    bound = 1 / math.sqrt(400)
    assert layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_b.any()
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    nn.init.ones_(layer.lora_b)
    old = layer.lora_a.clone()
    layer.adapter.reset()
    assert not layer.lora_b.any()
    assert not torch.equal(layer.lora_a, old)


def test_without_an_adapter() -> None:
    for kind in KINDS.values():
        layer = kind.from_linear(linear(), config(), adapter=False)
        assert layer.rank == 0
        assert layer.lora_a is layer.lora_b is None
        assert not any(p.requires_grad for p in layer.parameters())
        assert torch.equal(layer.merged_weight(), layer.base_weight())
        torch.testing.assert_close(
            layer(inputs()), F.linear(inputs(), layer.base_weight(), layer.bias)
        )


def test_a_quantized_weight_is_taken_over() -> None:
    first = quantized()
    second = QLoRALinear.from_linear(linear(), config(), quantized=first.weight)
    assert second.packed is first.packed
    assert second.weight.absmax is first.absmax


def test_a_dense_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config.format must .* got None"):
        QLoRALinear.from_linear(linear(), config(format=None))


def test_weight_tells_what_it_is() -> None:
    q = quantized(format="fp4").weight
    assert (q.format, q.blocksize, q.scale_format) == ("fp4", 32, "dynamic8")
    assert (q.shape, q.dtype) == ((N, K), torch.float32)
    assert torch.equal(dequantize_4bit(q), quantized(format="fp4").base_weight())


def test_repr_says_the_data_type() -> None:
    text = repr(quantized(dropout=0.25))
    for part in ("in_features=40", "rank=4", "dropout=0.25", "nf4", "blocksize=32", "dynamic8"):
        assert part in text
    assert "scales=fp32" in repr(quantized(double_quant=False))


# --- Switched and merged ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_can_be_switched_off(kind: str) -> None:
    layer = trained(KINDS[kind].from_linear(linear(), config(dropout=0.5)))
    base = KINDS[kind].from_linear(linear(), config(), adapter=False)
    x = inputs(2, 3)
    assert not torch.allclose(layer(x), base(x))
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base(x))
    layer.adapter_enabled = True
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [linear, conv1d])
def test_merged_weight_is_the_layer(kind: str, make: Callable[[], nn.Module]) -> None:
    layer = trained(KINDS[kind].from_linear(make(), config()))
    merged = layer.merged_weight()
    assert merged.dtype == torch.float32
    assert not merged.requires_grad
    delta = 2.0 * layer.lora_b @ layer.lora_a
    torch.testing.assert_close(merged, layer.base_weight() + delta)
    torch.testing.assert_close(F.linear(inputs(), merged, layer.bias), layer(inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_works_in_training_alone(kind: str) -> None:
    layer = trained(KINDS[kind].from_linear(linear(), config(dropout=0.5)))
    x = inputs()
    assert not torch.equal(layer.train()(x), layer(x))
    without = trained(KINDS[kind].from_linear(linear(), config())).train()
    assert torch.equal(layer.eval()(x), without(x))


def test_both_kinds_train_alike() -> None:
    """The dense layer over the decoded weight has the gradients of the 4-bit one."""
    layer, base = quantized(), linear()
    base.weight.data = layer.base_weight()
    dense = LoRALinear.from_linear(base, config())
    dense.adapter.fill(layer.lora_a, layer.lora_b)
    results = []
    for module in (layer, dense):
        x = inputs(2, 3).requires_grad_()
        y = module(x)
        (y * torch.arange(N)).sum().backward()
        assert module.bias.grad is None
        results.append((y, x.grad, module.lora_a.grad, module.lora_b.grad))
    torch.testing.assert_close(*results)


# --- Moved, copied, saved ---------------------------------------------------------------------------


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_casts_leave_the_base_as_it_is(scales: str, cast: str) -> None:
    layer, dtype = quantized(**SCALES[scales]), {"bfloat16": torch.bfloat16, "half": torch.float16}
    before = layer.base_weight()
    old = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    getattr(layer, cast)()
    assert {name: (b.dtype, b.shape) for name, b in layer.named_buffers()} == {
        name: (b.dtype, b.shape) for name, b in old.items()
    }
    assert all(torch.equal(buffer, old[name]) for name, buffer in layer.named_buffers())
    assert torch.equal(layer.base_weight(), before)
    assert {p.dtype for p in layer.parameters()} == {dtype[cast]}
    assert layer.base_dtype == layer.weight.dtype == dtype[cast]
    assert layer(inputs(dtype=dtype[cast])).dtype == dtype[cast]
    assert layer.float().base_dtype == torch.float32
    assert torch.equal(layer.base_weight(), before)


def test_a_16_bit_layer() -> None:
    base = linear(dtype=torch.bfloat16)
    layer = trained(QLoRALinear.from_linear(base, config()))
    assert layer.base_dtype == torch.bfloat16
    assert layer.lora_a.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    y = layer(inputs(dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_a.grad.dtype == torch.float32


def test_to_the_meta_device() -> None:
    layer = quantized().to("meta")
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer(inputs(2, 3).to("meta")).shape == (2, 3, N)


def test_deepcopy_is_independent() -> None:
    layer = quantized()
    other = copy.deepcopy(layer)
    x = inputs()
    assert torch.equal(layer(x), other(x))
    other.packed.zero_()
    other.lora_a.data.zero_()
    assert layer.packed.any()
    assert layer.lora_a.any()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_round_trip(
    scales: str, assign: bool, through_file: bool, tmp_path: Path
) -> None:
    layer = quantized(**SCALES[scales])
    other = QLoRALinear.from_linear(nn.Linear(K, N), config(**SCALES[scales]))
    state = layer.state_dict()
    if through_file:
        from safetensors.torch import load_file, save_file

        save_file(state, tmp_path / "layer.safetensors")
        state = load_file(tmp_path / "layer.safetensors")
    assert not torch.equal(layer(inputs()), other(inputs()))
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(layer(inputs()), other(inputs()))
    assert set(state) == {
        *("packed", "absmax", "bias", "weight", "_extra_state"),
        *("adapters.default.lora_a", "adapters.default.lora_b"),
        *(("nested_absmax", "nested_offset") if layer.scale_format else ()),
    }


@pytest.mark.parametrize(
    "other",
    [
        {"format": "fp4"},
        {"blocksize": 64},
        {"scale_format": "e4m3"},
        {"double_quant": False},
    ],
)
def test_a_state_dict_of_another_data_type_is_refused(other: dict[str, Any]) -> None:
    """Its buffers can have the same shapes and dtypes; nothing is loaded then."""
    layer, state = quantized(), quantized(bias=False, **other).state_dict()
    model = nn.Sequential(layer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"state_dict must hold a weight with .*nf4.*; got .*"):
        model.load_state_dict({f"0.{name}": tensor + 0 for name, tensor in state.items()})
    assert all(torch.equal(before[name], new) for name, new in layer.state_dict().items())


def test_a_state_dict_of_another_shape_is_refused() -> None:
    """(24, 40) and (40, 24) take the same bytes."""
    other = QLoRALinear.from_linear(nn.Linear(N, K), config(), adapter=False)
    layer = QLoRALinear.from_linear(linear(), config(), adapter=False)
    with pytest.raises(ValueError, match=r"\[24, 40\].*; got .*\[40, 24\]"):
        layer.load_state_dict(other.state_dict())


def test_the_extra_state_is_readable() -> None:
    state = quantized().state_dict()["_extra_state"]
    assert json.loads(bytes(state.tolist())) == {
        "format": "nf4",
        "blocksize": 32,
        "scale_format": "dynamic8",
        "shape": [N, K],
    }


# --- Compiled ---------------------------------------------------------------------------------------


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.arange(y.shape[-1])).sum().backward()
    return [y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


@pytest.mark.parametrize("backend", ["aot_eager", *(["inductor"] if shutil.which("g++") else [])])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_without_a_graph_break(backend: str, bias: bool) -> None:
    layer = quantized(bias)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    expected = step(layer, inputs(2, 3))
    torch.testing.assert_close(step(compiled, inputs(2, 3)), expected)


def test_a_compiled_model() -> None:
    second = trained(QLoRALinear.from_linear(nn.Linear(N, 8), config(format="fp4")))
    model = nn.Sequential(quantized(), nn.Tanh(), second)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, inputs()), step(model, inputs()))


def test_compiled_once_for_all_batches() -> None:
    layer = quantized(dropout=0.5)
    counter, counts = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 17, 2):
        torch.manual_seed(rows)
        expected = step(layer, inputs(rows))
        torch.manual_seed(rows)
        torch.testing.assert_close(step(compiled, inputs(rows)), expected)
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_compiled_under_autocast_and_without_gradients() -> None:
    layer = quantized()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(inputs()), layer(inputs()))
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), layer(inputs()))


def test_a_quantized_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantized must have shape \(32, 64\); got \(64, 32\)"):
        QLoRALinear.from_linear(
            nn.Linear(64, 32), config(), quantized=quantize_4bit(torch.randn(64, 32))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_in_bfloat16(kind: str) -> None:
    """Trains, computes in x's dtype, and starts as its base does."""
    layer = KINDS[kind].from_linear(linear(), config(adapter_dtype="bfloat16"))
    assert {layer.lora_a.dtype, layer.lora_b.dtype} == {torch.bfloat16}
    x = torch.randn(3, K)
    base = KINDS[kind].from_linear(linear(), config(), adapter=False)
    assert torch.equal(layer(x), base(x))
    trained(layer)(x).sum().backward()
    assert layer(x).dtype == torch.float32
    assert layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == torch.bfloat16
    merged = layer.merged_weight()
    assert merged.dtype == torch.float32
    assert torch.allclose(x @ merged.mT + layer.bias, layer(x), atol=1e-4)


def test_another_weight_in_place() -> None:
    """On a layer that was made as a shape."""
    with torch.device("meta"):
        layer = QLoRALinear.from_linear(nn.Linear(K, N), config())
    weight = quantize_4bit(linear(dtype=torch.bfloat16).weight, blocksize=32)
    layer.weight = weight
    assert layer.base_dtype == torch.bfloat16
    assert torch.equal(layer.base_weight(), dequantize_4bit(weight, torch.float32))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(K, N), "weight must have shape torch.Size"),
        (torch.zeros(N, K), "weight must have blocksize 32; got 64"),
    ],
)
def test_another_weight_that_does_not_fit(weight: Tensor, message: str) -> None:
    layer = quantized()
    before = layer.base_weight()
    with pytest.raises(ValueError, match=message):
        layer.weight = quantize_4bit(weight)
    assert torch.equal(layer.base_weight(), before)
