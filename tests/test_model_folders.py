"""Model folders: which are read, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from qlora.pretrained import load_dense, load_tokenizer
from tests import tiny

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.model_folder(tmp_path / "model")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_dense(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq)"),
        ({"quantization_config": "gptq"}, "quantized already (gptq)"),
        ({"num_hidden_layers": 3}, "9 weights are missing in the files (model.layers.2."),
        ({"num_hidden_layers": 1}, "9 weights are not in config.json's model (model.layers.1."),
        (
            {"intermediate_size": 128},
            "0.mlp.down_proj.weight is (64, 96) in the files and (64, 128) by config.json",
        ),
    ],
)
def test_a_config_that_is_not_of_these_files_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    assert message in refusal(folder)


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    for name, message in (("config.json", "no such file"), ("model.safetensors", "no *.safeten")):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / name).unlink()
        assert message in refusal(copy)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot read the model" in refusal(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="model: cannot read the tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel])
def test_an_encoder_is_refused(tmp_path: Path, kind: type) -> None:
    folder = tiny.model_folder(tmp_path / "bert", kind(BertConfig(**SIZES)))
    assert f"{kind.__name__} is an encoder; a causal language model is needed" in refusal(folder)


def test_every_causal_model_is_read(tmp_path: Path) -> None:
    """GPT-NeoX is causal and yet has is_decoder = False; GPT-2 ties its weights."""
    models = (
        GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        BertLMHeadModel(BertConfig(is_decoder=True, **SIZES)),
        tiny.gpt2(),
        tiny.llama(tie_word_embeddings=True),
    )
    for i, model in enumerate(models):
        read = load_dense(tiny.model_folder(tmp_path / str(i), model.eval()))
        assert torch.equal(
            tiny.logits(read.eval(), tiny.tokens()), tiny.logits(model, tiny.tokens())
        )


def test_float64_is_read_as_float32(tmp_path: Path) -> None:
    model = load_dense(tiny.model_folder(tmp_path, tiny.llama().double()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(tiny.logits(model, tiny.tokens()), tiny.logits(tiny.llama(), tiny.tokens()))


def test_a_quantization_config_of_null_is_none(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    load_dense(folder)
