"""`SavedModule`: trained copies beside an original that stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qlora
from qlora.saved_modules import SavedModule, as_saved_module
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
    first = as_saved_module(model, "1.0")
    assert as_saved_module(model, "1.0") is first is model[1][0]


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


def test_inputs_by_name_and_several_outputs() -> None:
    """As of a decoder's attention, which transformers calls so."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
            return super().forward(x) + pair[0] + pair[1], None

    module = SavedModule(Twice(8, 5).bfloat16())
    module.add("a")
    pair = (torch.ones(5).bfloat16(), torch.ones(5).bfloat16())
    expected, _ = module(x=x().bfloat16(), pair=pair)
    module.select({"a": 1.0})
    y, none = module(x=x().bfloat16(), pair=pair)
    assert none is None
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    module.select({}, ["a"])
    with pytest.raises(ValueError, match=r"must have one input by position .*; got 0"):
        module(x=x(), pair=pair)


def test_whole_attentions_and_decoder_layers_train() -> None:
    names = ["layers.0.self_attn", "layers.1"]
    model = tiny.quantized(tiny.llama(), modules_to_save=names, target_modules=["gate_proj"])
    model(IDS, labels=IDS).loss.backward()
    copies = [p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(copies) == 4 + 9
    assert all(p.grad.any() for p in copies)


def test_a_module_within_another_is_a_part_of_that(tmp_path: Path) -> None:
    model = tiny.quantized(tiny.llama(), modules_to_save=["gate_proj", "layers.1.mlp"])
    wrapped = [name for name, module in model.named_modules() if isinstance(module, SavedModule)]
    assert wrapped == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp"]
    qlora.save_adapter(tiny.randomize_adapter(model), tmp_path)
    other = tiny.quantized(tiny.llama(), target_modules=None)
    with pytest.raises(ValueError, match="the adapter is for another model"):
        qlora.load_adapter(other, tmp_path)  # these modules are in 4 bits there
    other = tiny.llama()
    qlora.quantize_model(other, qlora.adapter_files.read_config(tmp_path))
    qlora.load_adapter(other, tmp_path)
    assert torch.equal(tiny.logits(other, IDS), tiny.logits(model, IDS))


def test_what_cannot_be_trained_whole_is_refused() -> None:
    """Before anything changes."""
    model = tiny.llama()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.act_fn has no parameters"):
        tiny.quantized(model, modules_to_save=["act_fn"])
    assert model.state_dict().keys() == before
    model = tiny.quantized(tiny.llama(), modules_to_save=["lm_head"])
    before = model.state_dict().keys()
    for name in ("layers.0.mlp", "layers.1.mlp.up_proj"):
        config = qlora.QLoRAConfig(target_modules=["q_proj"], modules_to_save=[name])
        with pytest.raises(ValueError, match=r"is quantized, or has adapters"):
            qlora.add_adapter(model, config, "b")
    assert model.state_dict().keys() == before
    qlora.add_adapter(model, qlora.QLoRAConfig(modules_to_save=["lm_head"]), "b")
    assert list(model.lm_head.adapters) == ["default", "b"]


def test_a_module_with_buffers_is_filled(tmp_path: Path) -> None:
    """As a norm over the batch has, which a file holds too."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8)))
    qlora.quantize_model(model, qlora.QLoRAConfig(rank=2, modules_to_save=["1"]))
    qlora.save_adapter(model, tmp_path)
    expected = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 64))
    assert not torch.equal(model.state_dict()["1.adapters.default.1.running_mean"], torch.zeros(8))
    qlora.load_adapter(model, tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_a_new_adapter_stays_out_of_what_is_trained_whole() -> None:
    """Whose parts are no layers of the model's."""
    model = tiny.quantized(tiny.llama(), modules_to_save=["lm_head", "layers.1"])
    qlora.add_adapter(model, qlora.QLoRAConfig(target_modules=".*"), "b")
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_a")]
    assert layers
    assert all(name.startswith("model.layers.0.") for name in layers)
    with pytest.raises(ValueError, match=r"lm_head.* matches none of"):
        qlora.add_adapter(model, qlora.QLoRAConfig(target_modules=["lm_head.original"]), "c")


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_embeddings(saved: list[str], tmp_path: Path) -> None:
    """transformers ties and saves them by name, as each checkpoint of its Trainer does."""
    model = tiny.llama(tie_word_embeddings=True)
    ties = copy.deepcopy(model.all_tied_weights_keys)
    expected = tiny.logits(model, IDS)
    qlora.quantize_model(model, qlora.QLoRAConfig(format=None, rank=2, modules_to_save=saved))
    model.save_pretrained(tmp_path / "adapted")
    model.tie_weights()
    original = getattr(model.lm_head, "original", model.lm_head).weight
    assert (
        original is getattr(model.model.embed_tokens, "original", model.model.embed_tokens).weight
    )
    assert torch.equal(tiny.logits(model, IDS), expected)
    qlora.set_adapter(model, None)
    qlora.merge(model)
    assert model.all_tied_weights_keys == ties == dict(model._tied_weights_keys)
    model.save_pretrained(tmp_path / "merged")
    model.tie_weights()
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path / "merged"), IDS), expected)
