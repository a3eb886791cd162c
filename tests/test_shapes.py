"""Models by name and by config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qlora.shapes import LLAMA, meta_model, model_config
from tests import tiny

# Touvron et al. 2023, table 2, counted: all parameters.
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
}


@pytest.mark.parametrize("name", LLAMA)
def test_llamas_have_their_parameters(name: str) -> None:
    model = meta_model(model_config(name), torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_name_in_capitals_and_another_depth() -> None:
    assert model_config("LLaMA-7B").hidden_size == 4096
    assert model_config("llama-65b", layers=2).num_hidden_layers == 2


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_folder_or_its_config(make: object, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        shapes = meta_model(model_config(path), torch.float32)
        assert {n: p.shape for n, p in shapes.named_parameters()} == {
            n: p.shape for n, p in model.named_parameters()
        }


def test_a_base_that_is_quantized_has_the_shapes_of_its_original(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "another"}}
    path.write_text(json.dumps(fields))
    assert model_config(path).hidden_size == 64


def test_code_that_came_with_the_model_is_not_run(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    own = {"auto_map": {"AutoModelForCausalLM": "model.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (tmp_path / "model.py").write_text("raise SystemExit('was run')")
    assert type(meta_model(model_config(path), torch.float32)).__name__ == "LlamaForCausalLM"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"llama-65b, a config.json or .*; got llama-9b"):
        model_config("llama-9b")
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        model_config(tmp_path)
    path = tmp_path / "config.json"
    for kind in ("unheard-of", "t5"):
        path.write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=rf"model_type must be a causal .*; got '{kind}'"):
            model_config(path)
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(ValueError, match=r"config.json: transformers cannot read it \("):
        model_config(path)
