"""LoRA+: two groups of parameters, with rates of their own, as PEFT makes them."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from qlora.adapters import set_adapter
from qlora.loraplus import loraplus_groups
from tests import tiny


def test_the_groups_are_pefts() -> None:
    theirs = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    expected = [
        (group["lr"], sorted(tuple(p.shape) for p in group["params"]))
        for group in optimizer.param_groups
        if group["params"]
    ]
    groups = loraplus_groups(tiny.quantized(tiny.llama()), 1e-3)
    found = [(group["lr"], sorted(tuple(p.shape) for p in group["params"])) for group in groups]
    assert found == [(pytest.approx(lr), shapes) for lr, shapes in expected]


def test_all_that_is_trained_is_in_one_group() -> None:
    model = tiny.quantized(tiny.llama(), dora=True, modules_to_save=["lm_head"])
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = [name for parameter, name in names.items() if parameter.requires_grad]
    first, second = loraplus_groups(model, 1e-3, 4.0)
    assert (first["lr"], second["lr"]) == (1e-3, 4e-3)
    assert (first["lr_ratio"], second["lr_ratio"]) == (1.0, 4.0)
    in_second = {names[parameter] for parameter in second["params"]}
    assert in_second == {name for name in trained if name.endswith("lora_b")}
    in_first = {names[parameter] for parameter in first["params"]}
    assert in_first == set(trained) - in_second
    assert any(name.endswith("magnitude") for name in in_first)
    assert any(name.startswith("lm_head") for name in in_first)


def test_a_ratio_of_1_is_one_group() -> None:
    model = tiny.quantized(tiny.llama())
    (group,) = loraplus_groups(model, 1e-3, 1)
    assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())


def test_mistakes_are_named() -> None:
    for ratio in (0.5, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"ratio must be at least 1 and finite; got {ratio}"):
            loraplus_groups(tiny.quantized(tiny.llama()), 1e-3, ratio)
    with pytest.raises(ValueError, match="model must have adapters to train"):
        loraplus_groups(tiny.llama().requires_grad_(False), 1e-3)


def test_without_an_adapter_in_use_the_way_on_is_named() -> None:
    model = tiny.quantized(tiny.llama())
    set_adapter(model, None)
    with pytest.raises(ValueError, match=r"or set_adapter\(model, name\)"):
        loraplus_groups(model, 1e-3)
