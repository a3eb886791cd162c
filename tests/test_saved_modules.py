"""`SavedModule`: trained copies beside an original that stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import qlora
from qlora.saved_modules import SavedModule, wrap
from tests import tiny

IDS = tiny.tokens()


def saved() -> SavedModule:
    """With the copies "a" and "b", of which none is in use."""
    torch.manual_seed(0)
    module = SavedModule(nn.Linear(8, 5))
    for name, factor in (("a", 2.0), ("b", 3.0)):
        module.add(name)
        module.adapters[name].weight.data *= factor
    return module


def x(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(1))


def test_the_copy_in_use_answers() -> None:
    module = saved()
    original = module.original(x())
    assert torch.equal(module(x()), original)
    module.select({"a": 1.0})
    assert torch.equal(module(x()), module.adapters["a"](x()))
    assert module.weight is module.adapters["a"].weight
    module.adapter_enabled = False
    assert torch.equal(module(x()), original)
    module.select({"absent": 1.0})
    assert module.weight is module.original.weight


def test_copies_are_trained_and_the_original_is_not() -> None:
    module = saved()
    module.select({"b": 1.0})
    module(x()).sum().backward()
    with_gradient = {name for name, p in module.named_parameters() if p.grad is not None}
    assert with_gradient == {"adapters.b.weight", "adapters.b.bias"}
    assert not module.original.weight.requires_grad


@pytest.mark.parametrize("rows", [["a", None, "b", "a"], [None] * 4, ["absent", "b", "b", None]])
def test_each_row_has_its_own(rows: list[str | None]) -> None:
    module = saved()
    module.select({}, rows)
    y = module(x())
    for i, name in enumerate(rows):
        own = dict(module.adapters.items()).get(name, module.original)
        torch.testing.assert_close(y[i], own(x())[i])
    with pytest.raises(ValueError, match="each of 4 rows needs an input"):
        module(x(3))


def test_values_must_be_the_modules() -> None:
    module = saved()
    module.add("c", {"weight": torch.zeros(5, 8), "bias": torch.ones(5)})
    module.select({"c": 1.0})
    assert torch.equal(module(x()), torch.ones(4, 3, 5))
    for values in ({"weight": torch.zeros(5, 8)}, {"weight": torch.zeros(4, 8), "bias": x()}):
        with pytest.raises(ValueError, match=r"bias|weight"):
            module.add("d", values)
        assert "d" not in module.adapters


def test_wrapped_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    first = wrap(model, "1.0")
    assert wrap(model, "1.0") is first is model[1][0]


def test_a_model_trains_and_generates_with_whole_modules() -> None:
    model = tiny.quantized(tiny.llama(), modules_to_save=["lm_head", "embed_tokens"])
    base = tiny.logits(model, IDS)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with qlora.disable_adapters(model):
        assert torch.equal(tiny.logits(model, IDS), base)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(".adapters.default." in key for key in changed)
    whole = {"lm_head.adapters.default.weight", "model.embed_tokens.adapters.default.weight"}
    assert whole < changed
    cached = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=1)
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=1, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("copied", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_a_copy_is_trained_in_a_dtype_of_its_own(
    copied: torch.dtype, computed: torch.dtype
) -> None:
    """And answers in that of the model, whether autocast is on or not."""
    for original, x in (
        (nn.Linear(8, 5), torch.randn(2, 8)),
        (nn.Embedding(8, 5), torch.tensor([1, 7])),
    ):
        module = SavedModule(original.to(computed))
        module.add("a", dtype=copied)
        module.select({"a": 1.0})
        x = x.to(computed) if x.is_floating_point() else x
        y = module(x)
        assert y.dtype == computed
        y.sum().backward()
        assert module.adapters["a"].weight.grad.dtype == copied
        torch.testing.assert_close(y, original(x), rtol=1e-2, atol=1e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == (original(x).dtype if x.is_floating_point() else computed)


def test_a_model_in_bf16_with_whole_modules_in_fp32() -> None:
    model = tiny.llama().bfloat16()
    tiny.quantized(model, modules_to_save=["lm_head", "embed_tokens", "norm"])
    model(IDS, labels=IDS).loss.backward()
    copies = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert len(copies) == 3
    assert {p.grad.dtype for p in copies.values()} == {torch.float32}
