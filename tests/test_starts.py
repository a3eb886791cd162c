"""LoftQ and PiSSA: what their papers promise, and the same factors as PEFT makes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qlora
from qlora import LoRALinear, QLoRAConfig, QLoRALinear, dequantize_4bit, quantize_4bit, starts
from tests import strategies as qst
from tests import tiny

METHODS = [starts.loftq, starts.pissa]
INITS = ["loftq", "pissa"]


def quantize(values: Tensor) -> qlora.QuantizedTensor:
    return quantize_4bit(values)


def weight(n: int = 96, k: int = 160, seed: int = 0) -> Tensor:
    """With singular values that fall, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    u, s, vt = torch.linalg.svd(torch.randn(n, k, generator=generator), full_matrices=False)
    return (u * (s[0] / torch.arange(1, len(s) + 1) ** 0.7)) @ vt


def computed(base: Any, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """What the layer multiplies by, in fp64."""
    dense = dequantize_4bit(base, torch.float32).double()
    return dense + scaling * (lora_b.double() @ lora_a.double())


def error(w: Tensor, start: tuple[Any, Tensor, Tensor], scaling: float) -> float:
    return (w.double() - computed(*start, scaling)).norm().item()


def linear(w: Tensor, conv1d: bool = False) -> nn.Module:
    layer = Conv1D(*w.shape) if conv1d else nn.Linear(*w.shape[::-1], bias=False)
    layer.weight = nn.Parameter(w.mT.contiguous() if conv1d else w)
    return layer


# --- What the papers promise ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaling", [0.25, 1.0, 8.0])
def test_the_error_falls_with_the_rank(method: Callable[..., Any], scaling: float) -> None:
    w = weight()
    plain = (w - dequantize_4bit(quantize(w))).norm().item()
    errors = [error(w, method(w, rank, scaling, quantize), scaling) for rank in (1, 8, 32, 96)]
    assert plain > errors[0] > errors[1] > errors[2] > errors[3]
    if method is starts.loftq:  # all of the error, but for rounding
        assert errors[-1] < 1e-5 * plain


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_the_iterations(method: Callable[..., Any]) -> None:
    w = weight()
    errors = [error(w, method(w, 16, 0.5, quantize, t), 0.5) for t in (1, 2, 5)]
    assert errors[0] > errors[1] > errors[2]


def test_the_steps_are_those_of_the_algorithms() -> None:
    """LoftQ ends with a decomposition, PiSSA with a quantization, and each starts with the other."""
    w, order = weight(), []

    def noted(values: Tensor) -> qlora.QuantizedTensor:
        order.append(values)
        return quantize(values)

    base, lora_a, lora_b = starts.loftq(w, 4, 2.0, noted)
    assert torch.equal(order[0], w)
    assert torch.equal(base.packed, quantize(w).packed)
    u, s, vt = torch.linalg.svd((w - dequantize_4bit(base)).double())
    torch.testing.assert_close(
        2.0 * (lora_b @ lora_a).double(), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5, rtol=0
    )
    order.clear()
    base, lora_a, lora_b = starts.pissa(w, 4, 2.0, noted)
    u, s, vt = torch.linalg.svd(w.double())
    principal = (u[:, :4] * s[:4]) @ vt[:4]
    torch.testing.assert_close(2.0 * (lora_b @ lora_a).double(), principal, atol=1e-5, rtol=0)
    torch.testing.assert_close(order[0].double(), w.double() - principal, atol=1e-5, rtol=0)
    assert torch.equal(base.packed, quantize(order[0]).packed)


def test_each_factor_has_the_square_root_of_the_singular_values() -> None:
    w, scaling = weight(), 0.25
    lora_a, lora_b = starts.principal(w, 8, scaling)
    expected = torch.linalg.svdvals(w)[:8] / scaling
    torch.testing.assert_close(lora_a.square().sum(1), expected)
    torch.testing.assert_close(lora_b.square().sum(0), expected)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 70),
    rank=st.integers(1, 80),
    scaling=st.sampled_from([0.01, 0.25, 1.0, 16.0]),
    method=st.sampled_from(METHODS),
    iterations=st.integers(1, 3),
    seed=qst.seeds,
)
def test_any_shape_and_rank(
    n: int,
    k: int,
    rank: int,
    scaling: float,
    method: Callable[..., Any],
    iterations: int,
    seed: int,
) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    base, lora_a, lora_b = method(w, rank, scaling, quantize, iterations)
    assert (lora_a.shape, lora_b.shape, base.shape) == ((rank, k), (n, rank), (n, k))
    assert lora_a.dtype == lora_b.dtype == torch.float32
    assert lora_a.isfinite().all()
    assert lora_b.isfinite().all()
    assert not lora_a[min(n, k) :].any()
    assert not lora_b[:, min(n, k) :].any()
    if rank >= min(n, k):  # the adapter can hold all
        assert error(w, (base, lora_a, lora_b), scaling) <= 1e-4 * w.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros_stays_one(method: Callable[..., Any]) -> None:
    base, lora_a, lora_b = method(torch.zeros(6, 9), 3, 0.5, quantize, 2)
    assert not computed(base, lora_a, lora_b, 0.5).any()


@pytest.mark.parametrize("what", ["weight", "error"])
def test_large_matrices_are_decomposed_quickly_and_nearly_as_well(what: str) -> None:
    """The best approximation is that of the exact decomposition; LoftQ's errors have the flattest spectrum."""
    matrix = weight(640, 768)
    if what == "error":
        matrix = matrix - dequantize_4bit(quantize(matrix))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    best = (matrix - (u[:, :64] * s[:64]) @ vt[:64]).norm()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lora_a, lora_b = starts.principal(matrix, 64, 0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert (matrix - 0.25 * (lora_b @ lora_a)).norm() <= 1.001 * best
    torch.manual_seed(6)
    again = starts.principal(matrix, 64, 0.25)
    assert torch.equal(lora_a, again[0])
    assert torch.equal(lora_b, again[1])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_factors_are_rounded_before_the_base_is_made(method: Callable[..., Any]) -> None:
    w = weight()
    start = method(w, 16, 0.5, quantize, 2, torch.bfloat16)
    for factor in start[1:]:
        assert torch.equal(factor, factor.bfloat16().float())
    if method is starts.pissa:  # what rounding loses of the largest part goes into the base
        lora_a, lora_b = starts.principal(w, 16, 0.5)
        late = quantize(w - 0.5 * lora_b @ lora_a), lora_a.bfloat16(), lora_b.bfloat16()
        assert error(w, starts.pissa(w, 16, 0.5, quantize, 1, torch.bfloat16), 0.5) < error(
            w, late, 0.5
        )


# --- Against PEFT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("alpha", [4, 16])
def test_pissa_starts_as_pefts_does(alpha: int, conv1d: bool) -> None:
    import peft

    w = weight(48, 80)
    theirs = peft.get_peft_model(
        nn.Sequential(linear(w.clone(), conv1d)),
        peft.LoraConfig(
            r=8,
            lora_alpha=alpha,
            target_modules=["0"],
            init_lora_weights="pissa",
            fan_in_fan_out=conv1d,
        ),
    ).base_model.model[0]
    ours = LoRALinear.from_linear(
        linear(w, conv1d), QLoRAConfig(8, alpha, format=None, init="pissa")
    )
    assert ours.scaling == theirs.scaling["default"]
    base = theirs.get_base_layer().weight.detach()
    torch.testing.assert_close(ours.base_weight(), base.mT if conv1d else base)
    # singular vectors have no sign of their own
    lora_a, lora_b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(ours.lora_a.abs(), lora_a.abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.lora_b @ ours.lora_a, lora_b @ lora_a, atol=1e-5, rtol=1e-4)


def test_loftq_is_pefts_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs runs on a GPU alone, with bitsandbytes' quantizer: here with ours in its place, on the CPU."""
    import bitsandbytes as bnb
    from peft.utils import loftq_utils as theirs

    class Weight:
        quant_state = None

        def __init__(self, values: Tensor, **_: Any) -> None:
            self.data = quantize_4bit(values, double_quant=False)

        def to(self, _: str) -> Weight:
            return self

    to = Tensor.to
    monkeypatch.setattr(bnb.nn, "Params4bit", Weight)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda data, _: dequantize_4bit(data))
    monkeypatch.setattr(theirs, "clear_device_cache", lambda: None)
    monkeypatch.setattr(
        Tensor, "to", lambda self, *a, device=None, **b: to(self, *a, **b) if a or b else self
    )
    w = weight(48, 80)
    for iterations in (1, 3):
        base, lora_a, lora_b = theirs.loftq_init(w, 4, 8, iterations)
        ours, a, b = starts.loftq(
            w, 8, 1.0, lambda v: quantize_4bit(v, double_quant=False), iterations
        )
        torch.testing.assert_close(dequantize_4bit(ours), base, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(b @ a, lora_b @ lora_a, atol=1e-5, rtol=1e-4)


# --- In layers and models ---------------------------------------------------------------------------


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_a_layer_starts_nearer_to_its_weight(init: str, rslora: bool, conv1d: bool) -> None:
    w = weight()
    config = QLoRAConfig(rank=16, alpha=3, rslora=rslora, init=init, init_iterations=2)
    layer = QLoRALinear.from_linear(linear(w, conv1d), config)
    plain = QLoRALinear.from_linear(linear(w, conv1d), QLoRAConfig(rank=16))
    away = (layer.merged_weight() - w).norm()
    assert away < 0.9 * (plain.merged_weight() - w).norm()
    assert layer.scaling == pytest.approx(3 / (4 if rslora else 16))
    x = torch.randn(3, 160)
    torch.testing.assert_close(layer(x), x @ layer.merged_weight().mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_over_a_dense_base_changes_no_answer(dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    shared = linear(w)
    layer = LoRALinear.from_linear(shared, QLoRAConfig(16, 8, format=None, init="pissa"))
    assert torch.equal(shared.weight, w)
    assert layer.weight.dtype == dtype
    assert layer.base_weight().norm() < 0.8 * w.float().norm()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(layer.merged_weight(), w.float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("init", INITS)
def test_the_base_remembers_the_weights_dtype(init: str, dtype: torch.dtype) -> None:
    base, factors = starts.quantize_and_start(weight().to(dtype), QLoRAConfig(init=init), 4, 1.0)
    assert base.dtype == dtype
    assert all(factor.dtype == torch.float32 for factor in factors)


def test_without_an_adapter_or_a_start_the_weight_is_quantized_as_ever() -> None:
    w, plain = weight(), quantize_4bit(weight())
    for init, rank in (("lora", 4), ("pissa", 0), ("loftq", 0)):
        base, factors = starts.quantize_and_start(w, QLoRAConfig(init=init), rank, 1.0)
        assert factors is None
        assert torch.equal(base.packed, plain.packed)
    assert starts.split(w, QLoRAConfig(init="lora", format=None), 4, 1.0) == (w, None)
    assert starts.split(w, QLoRAConfig(init="loftq"), 4, 1.0) == (w, None)  # a dense head


@pytest.mark.parametrize("init", INITS)
def test_on_the_meta_device_only_sizes_are_worked_out(init: str) -> None:
    w = torch.empty(6, 9, device="meta", dtype=torch.bfloat16)
    base, (lora_a, lora_b) = starts.quantize_and_start(w, QLoRAConfig(init=init), 20, 1.0)
    assert base.shape == (6, 9)
    assert base.device.type == lora_a.device.type == lora_b.device.type == "meta"
    assert (lora_a.shape, lora_b.shape) == ((20, 9), (6, 20))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(init: str, value: float) -> None:
    w = weight()
    w[3, 5] = value
    with pytest.raises(ValueError, match="weight must be finite; got 1 NaN or infinite"):
        starts.quantize_and_start(w, QLoRAConfig(init=init), 4, 1.0)


def test_loftq_over_a_dense_model_is_refused() -> None:
    model = tiny.llama()
    with pytest.raises(
        ValueError, match=r"init must be 'lora' or 'pissa' on a dense base .* 'loftq'"
    ):
        tiny.quantized(model, format=None, init="loftq")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("init", INITS)
def test_a_model_starts_nearer_to_its_answers(make: Callable[[], nn.Module], init: str) -> None:
    dense, ids = make(), tiny.tokens()
    expected = tiny.logits(dense, ids)
    started = tiny.quantized(copy.deepcopy(dense), rank=16, init=init, init_iterations=3)
    plain = tiny.quantized(dense, rank=16)
    away = [(tiny.logits(model, ids) - expected).norm() for model in (started, plain)]
    assert away[0] < 0.9 * away[1]


@pytest.mark.parametrize("init", INITS)
def test_layers_that_share_a_weight_each_get_a_base_of_their_own(init: str) -> None:
    first, second = linear(weight(64, 64)), linear(weight(64, 64))
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second})
    config = QLoRAConfig(rank=4, init=init, init_iterations=2, rank_pattern={"b": 32})
    qlora.quantize_model(model, config)
    w = weight(64, 64)
    away = [(model[name].merged_weight() - w).norm() for name in "ab"]
    assert away[1] < 0.7 * away[0]


@pytest.mark.parametrize("init", INITS)
def test_a_start_and_a_reloaded_adapter_stand_on_the_same_base(tmp_path: Path, init: str) -> None:
    """The base is made anew from the weights, as qlora_config.json says."""
    from qlora.adapter_files import read_config

    settings = {"rank": 8, "init": init, "init_iterations": 2}
    model = tiny.randomize_adapter(tiny.quantized(tiny.llama(), **settings))
    qlora.save_adapter(model, tmp_path)
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    assert theirs.get("init_lora_weights", True) is True  # PEFT is not to change the base once more
    config = read_config(tmp_path)
    assert (config.init, config.init_iterations) == (init, 2)
    again = tiny.llama()
    qlora.quantize_model(again, config)
    qlora.load_adapter(again, tmp_path)
    assert torch.equal(tiny.logits(again, tiny.tokens()), tiny.logits(model, tiny.tokens()))
    with pytest.warns(UserWarning, match="trained on another base"):
        qlora.load_adapter(tiny.quantized(tiny.llama(), rank=8), tmp_path)


@pytest.mark.parametrize("init", INITS)
def test_streaming_starts_as_the_whole_model_does(tmp_path: Path, init: str) -> None:
    from qlora.pretrained import load_dense, load_quantized

    folder = tiny.model_folder(tmp_path)
    config = QLoRAConfig(rank=8, init=init, init_iterations=2)
    streamed, _ = load_quantized(folder, config, precision="float32")
    whole = load_dense(folder)
    qlora.quantize_model(whole, config)
    assert torch.equal(tiny.logits(streamed, tiny.tokens()), tiny.logits(whole, tiny.tokens()))
