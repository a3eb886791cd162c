"""Adapters merged into the base: dense layers that answer as the adapted ones did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import qlora
from qlora.adapters import merge
from tests import tiny

IDS = tiny.tokens()


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("format", ["nf4", None])
def test_the_merged_model_answers_as_the_adapted_one(
    make: Callable[[], nn.Module], format: str | None
) -> None:
    model = tiny.adapted(make, format=format)
    expected = tiny.logits(model, IDS)
    assert merge(model) is model
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    assert kinds == ({Conv1D, nn.Linear} if make is tiny.gpt2 else {nn.Linear})
    assert not any(isinstance(m, qlora.LoRALinear | qlora.QLoRALinear) for m in model.modules())
    torch.testing.assert_close(tiny.logits(model, IDS), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_merging_adds_in_fp32_and_rounds_once() -> None:
    model = tiny.adapted()
    layer = model.model.layers[0].mlp.gate_proj
    base = qlora.dequantize_4bit(layer.weight, torch.float32)
    with torch.no_grad():
        expected = base + layer.scaling * (layer.lora_b @ layer.lora_a)
    merge(model, torch.bfloat16)
    merged = model.model.layers[0].mlp.gate_proj.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, expected.to(torch.bfloat16))


def test_a_merged_weight_that_a_dtype_cannot_hold_is_refused() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(64, 64))
    model[1].weight.data *= 1e7
    tiny.quantized(model)
    with pytest.raises(ValueError, match=r"^1: .* not finite in torch.float16; merge to bfloat16"):
        merge(model, torch.float16)
    assert merge(model, torch.bfloat16)[1].weight.isfinite().all()


def test_a_merged_layer_has_the_dtype_that_it_had_before() -> None:
    model = tiny.adapted(lambda: tiny.llama().to(torch.bfloat16))
    assert merge(model).model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_plain_transformers_loads_a_merged_model(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model = merge(tiny.adapted(make))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(tiny.logits(loaded.eval(), IDS), tiny.logits(model, IDS))


def test_layers_without_an_adapter_and_single_layers_are_merged_too() -> None:
    model = merge(tiny.adapted(target_modules=["q_proj"]))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    config = qlora.QLoRAConfig(rank=2)
    layer = qlora.QLoRALinear.from_linear(nn.Linear(64, 8), config)
    x = torch.randn(3, 64)
    torch.testing.assert_close(merge(layer)(x), layer(x))
    with pytest.raises(ValueError, match="model must hold QLoRA layers to merge"):
        merge(tiny.llama())
