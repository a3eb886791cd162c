"""Model folders: which are read, and what is said of the others."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from qlora import QLoRAConfig
from qlora.pretrained import load_dense, load_quantized, load_tokenizer, save_dense
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
        ({"quantization_config": "gptq"}, "quantization_config must be a JSON object; got 'gptq'"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "foo"}, "config.json: "),
        ({"hidden_size": "64"}, "config.json: "),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"hidden_act": "none"}, "cannot read the model that config.json describes ("),
        ({"vocab_size": None}, "config.json"),
        ({"model_type": "nothing"}, "config.json: The checkpoint you are trying to load has model"),
        (
            {"model_type": "nothing", "auto_map": {"AutoConfig": "own.Config"}},
            "config.json: the model brings code of its own (auto_map), which is not supported",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_in_config_json_is_not_blamed_on_others(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    assert message in refusal(folder)
    if "config.json: " in message:
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_tokenizer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reading it as a whole
        with pytest.raises(ValueError, match=r"config\.json"):
            load_quantized(folder, QLoRAConfig())


def test_code_that_a_folder_brings_is_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether to."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Config"}
    edit_config(folder, model_type="nothing", auto_map=own)
    assert "code of its own" in refusal(folder)
    edit_config(folder, model_type="llama")
    load_dense(folder)
    path = folder / "tokenizer_config.json"
    changes = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Config", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"the tokenizer brings code of its own \(auto_map\)"):
        load_tokenizer(folder)
    assert not ran.exists()


def test_settings_for_generation_that_cannot_be_read_are_named(folder: Path) -> None:
    for content in ("{", "[]", '{"max_new_tokens": "many"}'):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            load_quantized(folder, QLoRAConfig())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n"


@pytest.mark.parametrize("content", [POINTER, b"", None], ids=["pointer", "empty", "truncated"])
def test_a_damaged_file_is_named(folder: Path, content: bytes | None) -> None:
    shutil.rmtree(folder)
    tiny.llama().save_pretrained(folder, max_shard_size="60KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10] if content is None else content)
    said = f"{file.name}: truncated or not a safetensors file"
    for message in (said, "download it again; is it a git-lfs pointer?"):
        assert message in refusal(folder)
    with pytest.raises(ValueError, match=said):
        load_quantized(folder, QLoRAConfig())
    file.unlink()
    assert f"{file.name}: no such file" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json: weight_map must name" in refusal(folder)


def test_a_full_disk_is_an_error_that_names_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    model = load_dense(folder)
    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"out: cannot write \(No space left on device\)"):
        save_dense(model, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_and_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    for name, message in (("config.json", "no such file"), ("model.safetensors", "no *.safeten")):
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / name).unlink()
        assert message in refusal(copy)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors: truncated or not a safetensors file" in refusal(folder)
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
