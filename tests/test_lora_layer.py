"""`LoRALayer`: DoRA, several adapters at once and an adapter for each row, held to dense arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora import LoRALinear, QLoRAConfig, QLoRALinear
from qlora.adapter import Adapter
from qlora.lora_layer import LoRALayer
from tests.test_modules import KINDS, conv1d, inputs, linear

N, K = 24, 40


def layer(kind: str, *ranks: int, dora: bool = False, **settings: Any) -> LoRALayer:
    """With adapters "a0", "a1", ... of these ranks that do something; none is in use."""
    config = QLoRAConfig(**{"rank": 1, "alpha": 4, "blocksize": 32, "dora": dora} | settings)
    made = KINDS[kind].from_linear(linear(), config, adapter=False)
    generator = torch.Generator().manual_seed(5)
    for i, rank in enumerate(ranks):
        adapter = Adapter(
            torch.randn(rank, K, generator=generator),
            torch.randn(N, rank, generator=generator),
            torch.rand(N, generator=generator) + 0.5 if dora else None,
            alpha=i + 1.0,
            rslora=i % 2 == 1,
            dropout=config.dropout,
        )
        made.add(f"a{i}", adapter)
    return made


def delta(made: LoRALayer, name: str) -> Tensor:
    adapter = made.adapters[name]
    return adapter.scaling * (adapter.lora_b @ adapter.lora_a)


def dora_weight(made: LoRALayer, name: str) -> Tensor:
    """DoRA, equation 5, in fp64."""
    adapter = made.adapters[name]
    weight = made.base_weight().double() + delta(made, name).double()
    return adapter.magnitude.double()[:, None] * weight / weight.norm(dim=1, keepdim=True)


# --- DoRA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [linear, conv1d, lambda: linear(bias=False)])
def test_a_fresh_dora_adapter_changes_nothing(kind: str, make: Any) -> None:
    """The magnitude starts as the length of each row of the base (DoRA, section 4.1)."""
    config = QLoRAConfig(rank=4, blocksize=32, dora=True)
    made = KINDS[kind].from_linear(make(), config)
    base = KINDS[kind].from_linear(make(), config, adapter=False)
    torch.testing.assert_close(made.adapter.magnitude, base.base_weight().norm(dim=1))
    torch.testing.assert_close(made(inputs()), base(inputs()))
    torch.testing.assert_close(made.merged_weight(), base.base_weight())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_dora_is_its_formula(kind: str, rank: int) -> None:
    made = layer(kind, rank, dora=True)
    made.select({"a0": 1.0})
    expected = dora_weight(made, "a0")
    y = F.linear(inputs(2, 3).double(), expected, made.bias.double())
    torch.testing.assert_close(made(inputs(2, 3)).double(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.merged_weight().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_is_a_constant_to_the_gradient(kind: str) -> None:
    """DoRA, section 4.3: as if |W + s B A| were a number, which is what the gradients are held to."""
    made = layer(kind, 3, dora=True)
    made.select({"a0": 1.0})
    adapter, x = made.adapter, inputs().requires_grad_()
    length = (made.base_weight() + delta(made, "a0").detach()).norm(dim=1)
    copies = [p.detach().clone().requires_grad_() for p in adapter()]
    other = x.detach().clone().requires_grad_()
    weight = made.base_weight() + adapter.scaling * copies[1] @ copies[0]
    expected = F.linear(other, weight) * (copies[2] / length) + made.bias
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (made(x) * seed).sum().backward()
    (expected * seed).sum().backward()
    for own, reference in zip((x, *adapter()), (other, *copies), strict=True):
        torch.testing.assert_close(own.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_dora_is_pefts() -> None:
    """The same output and gradients, but for dropout, which PEFT has on the base's part too."""
    made = layer("dense", 3, dora=True)
    made.select({"a0": 1.0})
    config = peft.LoraConfig(r=3, lora_alpha=1, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(linear()), config).base_model.model[0]
    for own, name in zip(
        made.adapter(), ("lora_A", "lora_B", "lora_magnitude_vector"), strict=True
    ):
        getattr(theirs, name)["default"].weight.data.copy_(own)
    for module in (made, theirs):
        module(inputs()).square().sum().backward()
    torch.testing.assert_close(made(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-4)
    for own, name in zip(
        made.adapter(), ("lora_A", "lora_B", "lora_magnitude_vector"), strict=True
    ):
        reference = getattr(theirs, name)["default"].weight.grad
        torch.testing.assert_close(own.grad, reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_a_direction_stays_zero(kind: str) -> None:
    base = linear()
    base.weight.data[3] = 0
    made = KINDS[kind].from_linear(base, QLoRAConfig(rank=2, blocksize=32, dora=True))
    y = made(inputs())
    y.sum().backward()
    assert torch.equal(y[:, 3], made.bias[3].expand(5))
    assert all(parameter.grad.isfinite().all() for parameter in made.adapter())
    assert made.merged_weight().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dora_in_other_dtypes(dtype: torch.dtype) -> None:
    made = layer("4-bit", 3, dora=True)
    made.select({"a0": 1.0})
    x = inputs(dtype=dtype)
    expected = F.linear(x.double(), dora_weight(made, "a0"), made.bias.double())
    y = made(x)
    assert y.dtype == dtype
    bound = 1e-6 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert (y.double() - expected).norm() < bound * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(inputs()).dtype == torch.bfloat16


def test_casts_and_copies_keep_the_lengths_of_rows() -> None:
    made = layer("4-bit", 3, dora=True)
    made.select({"a0": 1.0})
    squares = made.row_squares.clone()
    assert "row_squares" not in made.state_dict()
    for other in (copy.deepcopy(made).bfloat16(), copy.deepcopy(made).half()):
        assert other.row_squares.dtype == torch.float32
        assert torch.equal(other.row_squares, squares)
        assert torch.equal(other.adapters["a0"].magnitude, made.adapters["a0"].magnitude)
        assert other.adapters["a0"].lora_a.dtype == other.base_dtype
    assert made.to("meta").row_squares.is_meta


def test_another_base_weight_has_lengths_of_its_own() -> None:
    made, other = layer("4-bit", 3, dora=True), layer("4-bit", 3, dora=True)
    torch.manual_seed(9)
    second = QLoRALinear.from_linear(nn.Linear(K, N), QLoRAConfig(rank=1, blocksize=32), False)
    made.weight = second.weight
    other.load_state_dict(second.state_dict(), strict=False)
    squares = second.base_weight().square().sum(1)
    for changed in (made, other):
        torch.testing.assert_close(changed.row_squares, squares)


# --- Several at once --------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_a_weighted_sum_of_adapters(kind: str, ranks: list[int], weights: list[float]) -> None:
    made = layer(kind, *ranks)
    used = {f"a{i}": weight for i, weight in zip(range(len(ranks)), weights, strict=False)}
    made.select(used | {"absent": 1.0})
    assert made.active == used
    expected = made.base_weight() + sum(w * delta(made, name) for name, w in used.items())
    torch.testing.assert_close(made.merged_weight(), expected, rtol=1e-4, atol=1e-4)
    y = F.linear(inputs(), expected, made.bias)
    torch.testing.assert_close(made(inputs()), y, rtol=1e-4, atol=1e-3)


def test_gradients_reach_all_that_are_in_use() -> None:
    made = layer("4-bit", 2, 3, 1)
    made.select({"a0": 1.0, "a2": 0.5})
    made(inputs()).sum().backward()
    for name, adapter in made.adapters.items():
        assert all((p.grad is not None) == (name != "a1") for p in (adapter.lora_a, adapter.lora_b))


def test_one_answer_for_several_adapters_is_refused() -> None:
    made = layer("4-bit", 2, 3)
    made.select({"a0": 1.0, "a1": 1.0})
    with pytest.raises(ValueError, match=r"one adapter must be in use; got a0, a1"):
        made.lora_a  # noqa: B018
    made.select({})
    assert (made.adapter, made.lora_a, made.rank, made.scaling, made.dropout) == (
        *(None, None),
        *(0, 0.0, 0.0),
    )


# --- A row each -------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(KINDS)),
    st.booleans(),
    st.lists(st.sampled_from(["a0", "a1", "a2", None, "absent"]), min_size=1, max_size=6),
    st.sampled_from([(), (3,), (2, 1)]),
)
def test_each_row_has_its_own(
    kind: str, dora: bool, rows: list[str | None], middle: tuple[int, ...]
) -> None:
    """As if each row of the batch went through by itself."""
    made = layer(kind, 2, 1, 5, dora=dora)
    x = inputs(len(rows), *middle)
    made.select({}, rows)
    y = made(x)
    for i, name in enumerate(rows):
        made.select({} if name is None else {name: 1.0})
        torch.testing.assert_close(y[i : i + 1], made(x[i : i + 1]), rtol=1e-4, atol=1e-3)


def test_rows_have_gradients_and_dropout_of_their_own() -> None:
    made = layer("4-bit", 2, 3, dropout=0.5).train()
    made.select({}, ["a1", None])
    x = inputs(2, 4)
    assert not torch.equal(made(x)[0], made(x)[0])
    assert torch.equal(made(x)[1], made(x)[1])
    made(x).sum().backward()
    assert made.adapters["a0"].lora_b.grad is None
    assert made.adapters["a1"].lora_b.grad.any()


def test_rows_that_the_input_does_not_have_are_refused() -> None:
    made = layer("4-bit", 2)
    made.select({}, ["a0", None])
    for x in (inputs(3), inputs(2)[0], inputs(1, 2)):
        with pytest.raises(ValueError, match=r"each of 2 rows needs an input of shape \[2, ...\]"):
            made(x)
    made.adapter_enabled = False
    assert made(inputs(3)).shape == (3, N)


# --- Taken in and dropped ---------------------------------------------------------------------------


def test_an_adapter_that_does_not_fit_is_refused() -> None:
    made = layer("4-bit", 2)
    for factors, message in (
        (
            (torch.ones(2, K + 1), torch.ones(N, 2)),
            r"lora_a must have shape \(2, 40\); got \(2, 41\)",
        ),
        ((torch.ones(2, K), torch.ones(N, 3)), r"lora_b must have shape \(24, 2\); got \(24, 3\)"),
        ((torch.ones(2, K), torch.ones(N, 2), torch.ones(1)), r"magnitude must have shape \(24,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add("b", Adapter(*factors, alpha=1))
    with pytest.raises(ValueError, match="there is an adapter 'a0' already"):
        made.add("a0", Adapter(torch.ones(2, K), torch.ones(N, 2), alpha=1))


def test_a_layer_repeats_what_it_has() -> None:
    text = repr(layer("4-bit", 2, dora=True))
    for part in ("active=none", "(a0): Adapter(rank=2, scaling=0.5, dropout=0, dora)"):
        assert part in text


def test_the_base_never_changes() -> None:
    for kind in (QLoRALinear, LoRALinear):
        made = layer({QLoRALinear: "4-bit", LoRALinear: "dense"}[kind], 2, 3)
        before = made.base_weight().clone(), made(inputs()).clone()
        made.select({"a0": 1.0, "a1": 1.0})
        made(inputs()).sum().backward()
        made.merged_weight()
        made.select({})
        made.remove("a0")
        assert torch.equal(made.base_weight(), before[0])
        assert torch.equal(made(inputs()), before[1])


def test_a_cast_keeps_the_magnitude_that_an_optimizer_holds() -> None:
    made = layer("4-bit", 3, dora=True)
    made.select({"a0": 1.0})
    made(inputs()).sum().backward()
    magnitude = made.adapters["a0"].magnitude
    gradient = magnitude.grad.clone()
    made.bfloat16()
    assert made.adapters["a0"].magnitude is magnitude
    assert torch.equal(magnitude.grad, gradient)
    made(inputs().bfloat16()).sum().backward()
    assert magnitude.grad.dtype == torch.float32


def test_lengths_of_dora_are_exact_under_autocast() -> None:
    """Of B A alone here; in bf16 they would be off by a few thousandths."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    linear.weight.data.zero_()
    layer = LoRALinear.from_linear(linear, QLoRAConfig(format=None, rank=16, dora=True))
    layer.lora_b.data.normal_()
    expected = layer._row_lengths(layer.adapter, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer._row_lengths(layer.adapter, torch.float32)
    torch.testing.assert_close(under_autocast, expected, rtol=1e-6, atol=0)
