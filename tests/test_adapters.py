"""Several adapters on one base: switched, one for each row, weighted, combined, dropped; the base stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import qlora
from qlora.adapter import check_name
from qlora.adapters import active_adapters, adapter_parameters, hosts, sole_adapter
from qlora.config import QLoRAConfig
from qlora.recipe import TrainConfig
from qlora.train import train
from tests import tiny

IDS = tiny.tokens(rows=4)
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"rank": 4, "alpha": 8},
    "b": {"rank": 2, "alpha": 1, "target_modules": ["q_proj", "down_proj", "c_attn"]},
    "c": {"rank": 6, "alpha": 3, "rslora": True},
}


def many(
    make: Callable[[], nn.Module] = tiny.llama, format: str | None = "nf4", **more: Any
) -> nn.Module:
    """A model with the adapters "a", "b" and "c", which all do something; "a" is in use."""
    model = make()
    qlora.quantize_model(model, QLoRAConfig(format=format, target_modules=None))
    for i, (name, settings) in enumerate(SETTINGS.items()):
        targets = [t for t in settings.get("target_modules", ()) if _has(model, t)]
        chosen = {"target_modules": targets} if targets else {}
        qlora.add_adapter(model, QLoRAConfig(**settings | chosen | more), name)
        generator = torch.Generator().manual_seed(i)
        for parameter in adapter_parameters(model, name).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _has(model: nn.Module, target: str) -> bool:
    return any(name.endswith(f".{target}") for name, _ in model.named_modules())


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".adapters." not in key}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["nf4", None])
def test_all_linear_means_the_same_layers_whatever_was_adapted_before(
    format: str | None, tied: bool
) -> None:
    """Also those that a dense base has as plain layers yet; not the output embeddings, which were named before."""
    model = tiny.llama(tie_word_embeddings=tied)
    whole = QLoRAConfig(format=format, target_modules="all-linear")
    some = QLoRAConfig(format=format, target_modules=["q_proj", "lm_head"])
    fresh = tiny.llama(tie_word_embeddings=tied)
    qlora.quantize_model(fresh, whole)
    qlora.quantize_model(model, some)
    qlora.add_adapter(model, whole, "b")
    assert _layers_with(model, "b") == _layers_with(fresh, "default")
    qlora.add_adapter(model, some, "c")
    assert _layers_with(model, "c") == _layers_with(model, "default")


def _layers_with(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, host in hosts(model).items() if adapter in host.adapters}


# --- Switching --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("format", ["nf4", None])
def test_nothing_forgotten(make: Callable[[], nn.Module], format: str | None) -> None:
    """Whatever was done with adapters, the base is the same to the last bit, and so are its answers."""
    plain = make()
    qlora.quantize_model(plain, QLoRAConfig(format=format, target_modules=None))
    expected = tiny.logits(plain, IDS)
    if format:
        model = many(make, format)
    else:  # a dense base: adapters come over plain layers
        model = make()
        qlora.quantize_model(model, QLoRAConfig(format=None, **SETTINGS["a"]))
        tiny.randomize_adapter(model)
        qlora.add_adapter(model, QLoRAConfig(**SETTINGS["c"]), "c")
    names = qlora.adapter_names(model)
    before = base_state(model)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    qlora.combine_adapters(model, dict.fromkeys(names, 0.5), "mix")
    qlora.set_adapter(model, "mix")
    assert not torch.allclose(tiny.logits(model, IDS), expected, atol=1e-3)
    with qlora.disable_adapters(model):
        assert torch.equal(tiny.logits(model, IDS), expected)
    with qlora.use_adapter(model, None):
        assert torch.equal(tiny.logits(model, IDS), expected)
    qlora.enable_adapters(model, False)
    assert torch.equal(tiny.logits(model, IDS), expected)
    qlora.set_adapter(model, None)
    assert torch.equal(tiny.logits(model, IDS), expected)
    for name in (*names, "mix"):
        qlora.delete_adapter(model, name)
    assert torch.equal(tiny.logits(model, IDS), expected)
    after = base_state(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_first_adapter_is_in_use_and_set_adapter_changes_it() -> None:
    model = many()
    assert qlora.adapter_names(model) == ("a", "b", "c")
    assert active_adapters(model) == ("a",)
    outputs = {}
    for name in "abca":
        qlora.set_adapter(model, name)
        assert active_adapters(model) == (name,)
        y = tiny.logits(model, IDS)
        assert torch.equal(outputs.setdefault(name, y), y)
        trainable = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == adapter_parameters(model, name).keys()
    assert len({y.sum().item() for y in outputs.values()}) == 3


def test_use_adapter_holds_for_its_block() -> None:
    model = many()
    first = tiny.logits(model, IDS)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    with qlora.use_adapter(model, "c"):
        inside = tiny.logits(model, IDS)
        with qlora.use_adapter(model, {"a": 1.0}):
            assert torch.equal(tiny.logits(model, IDS), first)
        assert torch.equal(tiny.logits(model, IDS), inside)
        assert trainable == {key for key, p in model.named_parameters() if p.requires_grad}
    assert not torch.equal(inside, first)
    assert torch.equal(tiny.logits(model, IDS), first)
    with pytest.raises(KeyError), qlora.use_adapter(model, "c"):
        raise KeyError
    assert torch.equal(tiny.logits(model, IDS), first)
    qlora.enable_adapters(model, False)
    with qlora.use_adapter(model, "c"):
        assert torch.equal(tiny.logits(model, IDS), inside)
    assert not torch.equal(tiny.logits(model, IDS), first)


@pytest.mark.parametrize("block", [lambda m: qlora.use_adapter(m, "c"), qlora.disable_adapters])
def test_a_block_ends_as_it_began(block: Callable[[nn.Module], Any]) -> None:
    """Whatever is chosen within: what is in use and what is trainable belong together."""
    model = many()
    for name in ("a", "b"):
        if name != "a":
            qlora.set_adapter(model, name)
        with block(model):
            qlora.set_adapter(model, "c")
            with qlora.use_adapter(model, "a"):
                qlora.set_adapter(model, None)
            assert active_adapters(model) == ("c",)
            qlora.delete_adapter(model, "c")
            qlora.add_adapter(model, QLoRAConfig(rank=2), "c")
        assert active_adapters(model) == (name,)
        trainable = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trainable == adapter_parameters(model, name).keys()


@pytest.mark.parametrize("adapter", [["a"], 3, ("a", "b"), True])
def test_what_is_no_selection_is_refused(adapter: Any) -> None:
    model = many()
    with pytest.raises(TypeError, match=r"adapter must be a name, a mapping .* use use_adapter"):
        qlora.set_adapter(model, adapter)
    for weight in ("1", True, None):
        with pytest.raises(TypeError, match="the weight of adapter 'a' must be a number; got"):
            qlora.set_adapter(model, {"a": weight})
    with pytest.raises(TypeError, match="weights must be a mapping from names to weights; got 'a'"):
        qlora.combine_adapters(model, "a", "x")
    assert active_adapters(model) == ("a",)


def test_an_adapter_may_be_dropped_while_rows_use_it() -> None:
    model = many()
    with qlora.use_adapter(model, ["c", "a", "a", "c"]):
        qlora.delete_adapter(model, "c")
        inside = tiny.logits(model, IDS)
    with qlora.use_adapter(model, [None, "a", "a", None]):
        assert torch.equal(tiny.logits(model, IDS), inside)


def test_an_adapter_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="target_modules must name the layers of the new adapter"):
        qlora.add_adapter(many(), QLoRAConfig(target_modules=None), "d")


# --- For each row -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("saved", [[], ["lm_head"]])
def test_an_adapter_for_each_row(dora: bool, saved: list[str]) -> None:
    model = many(dora=dora, modules_to_save=saved)
    rows = ["c", None, "a", "b"]
    with qlora.use_adapter(model, rows):
        y = tiny.logits(model, IDS)
    for i, name in enumerate(rows):
        with qlora.use_adapter(model, name):
            expected = tiny.logits(model, IDS[i : i + 1])
        torch.testing.assert_close(y[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_each_row_generates_with_its_own() -> None:
    model = many()
    rows, settings = ["b", "c", None, "a"], {"do_sample": False, "pad_token_id": 1}
    with qlora.use_adapter(model, rows):
        together = model.generate(IDS, max_new_tokens=5, **settings)
    for i, name in enumerate(rows):
        with qlora.use_adapter(model, name):
            alone = model.generate(IDS[i : i + 1], max_new_tokens=5, **settings)
        assert torch.equal(together[i : i + 1, : alone.shape[1]], alone)


def test_rows_are_trained_together() -> None:
    model = many()
    qlora.set_adapter(model, {"a": 1.0, "c": 1.0})  # which makes both trainable
    with qlora.use_adapter(model, ["a", "c", "a", None]):
        model(IDS, labels=IDS).loss.backward()
    for name in "abc":
        found = adapter_parameters(model, name).values()
        assert {p.grad is not None for p in found} == {name != "b"}


def test_rows_that_do_not_fit_are_refused() -> None:
    model = many()
    with pytest.raises(ValueError, match=r"no adapter 'd' in the model; it has a, b, c"):
        qlora.use_adapter(model, ["a", "d"]).__enter__()
    with (
        qlora.use_adapter(model, ["a", "b"]),
        pytest.raises(ValueError, match="an adapter for each of 2 rows needs an input of shape"),
    ):
        model(IDS)


# --- Weighted and combined --------------------------------------------------------------------------


def test_a_weighted_sum_is_the_combined_adapter(tmp_path: Path) -> None:
    model = many()
    weights = {"a": 0.75, "b": -1.5, "c": 0.25}
    qlora.combine_adapters(model, weights, "mix")
    with qlora.use_adapter(model, weights):
        expected = tiny.logits(model, IDS)
    with qlora.use_adapter(model, "mix"):
        torch.testing.assert_close(tiny.logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
    layers = hosts(model)
    assert layers["model.layers.0.self_attn.q_proj"].adapters["mix"].rank == 4 + 2 + 6
    assert layers["model.layers.0.self_attn.k_proj"].adapters["mix"].rank == 4 + 6
    qlora.save_adapter(model, tmp_path, "mix")
    other = tiny.quantized(tiny.llama(), target_modules=None)
    qlora.load_adapter(other, tmp_path, "mix")
    with qlora.use_adapter(model, "mix"):
        assert torch.equal(tiny.logits(other, IDS), tiny.logits(model, IDS))


def test_combined_as_peft_does(tmp_path: Path) -> None:
    model = many()
    for name in "ac":
        qlora.save_adapter(model, tmp_path / name, name)
    base = qlora.merge(tiny.quantized(tiny.llama(), target_modules=None))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "c", adapter_name="c")
    theirs.add_weighted_adapter(["a", "c"], [0.5, 0.25], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    with qlora.use_adapter(model, {"a": 0.5, "c": 0.25}):
        expected = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(theirs.eval(), IDS), expected, rtol=1e-4, atol=1e-4)


def test_scaled() -> None:
    """A weight of 0 is the base, of 1 the adapter, and in between is in between."""
    model = many()
    with qlora.use_adapter(model, {"a": 1.0}):
        full = tiny.logits(model, IDS)
    assert torch.equal(full, tiny.logits(model, IDS))
    with qlora.use_adapter(model, {"a": 0.0}):
        torch.testing.assert_close(tiny.logits(model, IDS), _base(model))
    layer = hosts(model)["model.layers.1.mlp.up_proj"]
    with qlora.use_adapter(model, {"a": 0.25}):
        change = layer.merged_weight() - layer.base_weight()
    torch.testing.assert_close(4 * change, layer.merged_weight() - layer.base_weight())


def _base(model: nn.Module) -> torch.Tensor:
    with qlora.disable_adapters(model):
        return tiny.logits(model, IDS)


# --- Loaded, trained, dropped -----------------------------------------------------------------------


def test_loaded_under_names(tmp_path: Path) -> None:
    model = many()
    expected = {}
    for name in "abc":
        qlora.save_adapter(model, tmp_path / name, name)
        with qlora.use_adapter(model, name):
            expected[name] = tiny.logits(model, IDS)
    other = tiny.quantized(tiny.llama(), target_modules=None)
    for name in "cba":
        qlora.load_adapter(other, tmp_path / name, f"my-{name}")
    assert qlora.adapter_names(other) == ("my-c", "my-b", "my-a")
    assert active_adapters(other) == ("my-c",)
    for name in "abc":
        qlora.set_adapter(other, f"my-{name}")
        assert torch.equal(tiny.logits(other, IDS), expected[name])
    qlora.delete_adapter(other, "my-c")
    assert qlora.adapter_names(other) == ("my-b", "my-a")
    assert active_adapters(other) == ()


def test_trained_one_after_the_other(tmp_path: Path) -> None:
    """Training one leaves the others and the base alone."""
    model = many()
    config = TrainConfig(steps=2, micro_batch_size=2, gradient_accumulation_steps=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    qlora.set_adapter(model, "c")
    train(model, tiny.examples(4), config, tmp_path / "c", progress=False)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == adapter_parameters(model, "c").keys()
    other = tiny.quantized(tiny.llama(), target_modules=None)
    qlora.load_adapter(other, tmp_path / "c", "c")
    assert torch.equal(tiny.logits(other, IDS), tiny.logits(model, IDS))
    qlora.set_adapter(model, {"a": 1.0, "c": 1.0})
    with pytest.raises(ValueError, match="must have one adapter in use"):
        train(model, tiny.examples(4), config, tmp_path / "both", progress=False)


def test_an_adapter_is_small(tmp_path: Path) -> None:
    from qlora.adapter_files import adapter_bytes

    model = many()
    qlora.save_adapter(model, tmp_path, "b")
    own, base = adapter_bytes(model, "b")
    assert own == sum(p.nbytes for p in adapter_parameters(model, "b").values())
    on_disk = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert own < on_disk < own + 4096
    assert base == sum(
        tensor.nbytes
        for tensor in (*model.parameters(), *model.buffers())
        if not any(tensor is p for n in "abc" for p in adapter_parameters(model, n).values())
    )


# --- Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "a.b", "ü", "a b", "keys", "training", "_parameters", 1, None]
)
def test_names_that_cannot_be_parts_of_parameter_names(name: Any) -> None:
    with pytest.raises(ValueError, match="name of an adapter must"):
        check_name(name)
    with pytest.raises(ValueError, match="name of an adapter must"):
        qlora.add_adapter(many(), QLoRAConfig(), name)


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = many()
    known = r"no adapter 'z' in the model; it has a, b, c"
    for mistake in (
        lambda: qlora.set_adapter(model, "z"),
        lambda: qlora.set_adapter(model, {"a": 1.0, "z": 1.0}),
        lambda: qlora.delete_adapter(model, "z"),
        lambda: qlora.save_adapter(model, tmp_path, "z"),
        lambda: qlora.combine_adapters(model, {"z": 1.0}, "mix"),
    ):
        with pytest.raises(ValueError, match=known):
            mistake()
    there = r"there is an adapter 'b' already: delete_adapter\(model, 'b'\)"
    with pytest.raises(ValueError, match=there):
        qlora.add_adapter(model, QLoRAConfig(), "b")
    with pytest.raises(ValueError, match=there):
        qlora.combine_adapters(model, {"a": 1.0}, "b")
    with pytest.raises(ValueError, match="the weight of adapter 'a' must be finite; got nan"):
        qlora.set_adapter(model, {"a": math.nan})
    with pytest.raises(ValueError, match="weights must name at least one adapter"):
        qlora.combine_adapters(model, {}, "mix")
    with pytest.raises(ValueError, match=r"init must be 'lora' on a base .* got 'pissa'"):
        qlora.add_adapter(model, QLoRAConfig(init="pissa"), "d")
    with pytest.raises(ValueError, match="target_modules must match a linear layer; 'q_prj'"):
        qlora.add_adapter(model, QLoRAConfig(target_modules=["q_prj"]), "d")
    assert qlora.adapter_names(model) == ("a", "b", "c")
    qlora.set_adapter(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"must have one adapter in use: .* in use are a, b, the"):
        sole_adapter(model)
    with pytest.raises(ValueError, match="call quantize_model"):
        qlora.set_adapter(tiny.llama(), "a")


@pytest.mark.parametrize(
    ("more", "weights", "message"),
    [
        ({"dora": True}, {"a": 0.5}, "has a DoRA adapter, of which there is no weighted sum"),
        ({"dora": True}, {"a": 1.0, "c": 1.0}, "DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, {"a": 1.0, "c": 1.0}, "lm_head is trained whole"),
    ],
)
def test_what_has_no_sum_is_refused(
    more: dict[str, Any], weights: dict[str, float], message: str
) -> None:
    model = many(**more)
    with pytest.raises(ValueError, match=message):
        qlora.set_adapter(model, weights)
    with pytest.raises(ValueError, match=message):
        qlora.combine_adapters(model, weights, "mix")
    assert active_adapters(model) == ("a",)
    qlora.set_adapter(model, {"a": 1.0})


def test_adapters_of_different_dropout_or_too_many_ranks_do_not_add_up() -> None:
    model = many()
    qlora.add_adapter(model, QLoRAConfig(rank=4, dropout=0.5), "d")
    with pytest.raises(ValueError, match="must have the same dropout"):
        qlora.set_adapter(model, {"a": 1.0, "d": 1.0})
    qlora.add_adapter(model, QLoRAConfig(rank=253), "e")
    with pytest.raises(ValueError, match=r"their ranks come to 257 .* of 256 that are allowed"):
        qlora.combine_adapters(model, {"a": 1.0, "e": 1.0}, "mix")


# --- Gradient checkpointing -------------------------------------------------------------------------


def checkpointed(model: nn.Module, reentrant: bool = False) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def loss(model: nn.Module) -> torch.Tensor:
    return model(IDS, labels=IDS).loss


def gradients(model: nn.Module, name: str) -> list[torch.Tensor]:
    return [parameter.grad for parameter in adapter_parameters(model, name).values()]


def test_a_pass_is_repeated_with_the_same_adapters_or_not_at_all() -> None:
    model = checkpointed(many())
    with qlora.use_adapter(model, "c"):
        outside = loss(model)
    with pytest.raises(
        RuntimeError, match=r"with 'a' in use, .* with 'c': backward belongs inside"
    ):
        outside.backward()
    outside = loss(model)
    qlora.set_adapter(model, {"a": 0.5, "b": 0.5})
    with pytest.raises(RuntimeError, match="with 'a' and 'b' in use, which was made with 'a'"):
        outside.backward()
    qlora.set_adapter(model, "a")
    with qlora.use_adapter(model, ["a", None, "b", "a"]):
        outside = loss(model)
    with (
        qlora.disable_adapters(model),
        pytest.raises(RuntimeError, match=r"base alone .*'b', 'a'\]"),
    ):
        outside.backward()


def test_a_whole_module_is_not_repeated_with_another_either() -> None:
    model = checkpointed(many(modules_to_save=["input_layernorm"], target_modules=["down_proj"]))
    model.model.layers[0].mlp.down_proj._check_recomputed = lambda: None
    model.model.layers[1].mlp.down_proj._check_recomputed = lambda: None
    with qlora.use_adapter(model, "c"):
        outside = loss(model)
    with pytest.raises(RuntimeError, match="with 'a' in use, which was made with 'c'"):
        outside.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    """Also where another adapter, or none, answers between the passes, as a reference does."""
    plain, model = many(), many()
    plain.train()
    loss(plain).backward()
    checkpointed(model, reentrant)
    with qlora.use_adapter(model, "c"):  # not checkpointed, and its backward never comes
        model.eval()
        loss(model)
        model.train()
    forward = loss(model)
    with torch.no_grad(), qlora.use_adapter(model, "b"):
        loss(model)
    with torch.no_grad(), qlora.disable_adapters(model):
        loss(model)
    forward.backward()
    pairs = zip(gradients(plain, "a"), gradients(model, "a"), strict=True)
    assert all(torch.equal(expected, got) for expected, got in pairs)


@pytest.mark.parametrize("adapter", [["a", None, "b", "c"], {"a": 0.5, "b": -1.0}])
def test_rows_and_sums_are_repeated(adapter: Any) -> None:
    model = checkpointed(many())
    with qlora.use_adapter(model, adapter):
        loss(model).backward()
    assert all(grad.any() for grad in gradients(model, "a"))
