"""Folders in 4 bits that are damaged, and folders that cannot be quantized: what is said of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import pretrained, quantize_model, quantized_folder
from qlora.pretrained import base_settings, load_tokenizer, quantize_folder
from tests.test_loading import build
from tests.test_quantized_folder import DOWN, UP, config, edit, loaded, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in 4 bits, to be damaged."""
    quantize_folder(make(tmp_path), tmp_path / "folder", config())
    return tmp_path / "folder"


def test_what_cannot_be_quantized_is_refused(folder: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    with pytest.raises(ValueError, match=r"quantized already \(qlora\), a dense model is needed"):
        quantize_folder(folder, tmp_path / "new", config())
    with pytest.raises(ValueError, match=r"quantized already \(qlora\), a dense model is needed"):
        pretrained.load_dense(folder)
    with pytest.raises(ValueError, match="format must name a 4-bit data type; got None"):
        quantize_folder(dense, tmp_path / "new", config(format=None))
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        quantize_folder(dense, folder, config())
    edit(dense, quantization_config={"quant_method": "gptq"})
    for call in (loaded, lambda path: quantize_folder(path, tmp_path / "new", config())):
        with pytest.raises(ValueError, match=r"quantized already \(gptq\)"):
            call(dense)
    model = build("llama")
    with pytest.raises(ValueError, match="model must hold quantized layers"):
        quantized_folder.save(model, tmp_path / "dense", tmp_path / "new")
    quantize_model(model.model, config())
    model.model.layers[0].mlp.up_proj.format = "int4"
    with pytest.raises(ValueError, match="all with the same format and scales"):
        quantized_folder.save(model, tmp_path / "dense", tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "quantization_config has an unknown field 'colour'"),
        ({"format": None}, "quantization_config must have format"),
        ({"scale_format": None}, "quantization_config must have scale_format"),
        ({"dtype": None}, "quantization_config must have dtype"),
        ({"format": "nf3"}, "nf3"),
        ({"blocksize": "64"}, "blocksize must be of type int"),
        ({"format": ["nf4"]}, "quantization_config: format must be of type str; got ['nf4']"),
        ({"other_dtypes": {"a": ["float32"]}}, "dtype must be one of"),
        ({"dtype": "float8"}, "dtype must be one of float64, float32, float16, bfloat16; got"),
        ({"other_dtypes": {f"{UP}.weight": "int8"}}, "dtype must be one of"),
        ({"other_dtypes": ["a"]}, "config.json: quantization_config: other_dtypes must be of type"),
        ({"other_dtypes": {"a.weight": "float32"}}, "other_dtypes: no parameter or buffer 'a."),
        ({"format": "int4"}, "_extra_state: state_dict must hold a weight with"),
        ({"double_quant": False}, "absmax must have dtype torch.float32; got torch.uint8"),
        ({"blocksize": 64}, "absmax must have shape"),
        ({"dtype": "float32"}, "must have dtype torch.float32; got torch.bfloat16"),
    ],
    ids=str,
)
def test_a_wrong_config_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    given = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
    edit(folder, quantization_config={k: v for k, v in given.items() if v is not None})
    assert message in refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        loaded(folder, **{"blocksize": 32} | base_settings(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"a": torch.ones(1)}, "a is not in config.json's model"),
        (lambda t: dropped(t, f"{UP}.packed"), f"{UP}.packed is missing in the safetensors files"),
        (lambda t: dropped(t, f"{UP}.nested_offset"), f"{UP}.nested_offset is missing"),
        (lambda t: dropped(t, f"{UP}._extra_state"), f"{UP}._extra_state is missing"),
        (lambda t: dropped(t, "model.norm.weight"), "model.norm.weight is missing"),
        (
            lambda t: t | {f"{UP}.packed": t[f"{UP}.packed"][:-1]},
            f"{UP}.packed must have shape (3072,); got (3071,)",
        ),
        (
            lambda t: t | {"lm_head.weight": t["lm_head.weight"].float()},
            "lm_head.weight must have dtype torch.bfloat16; got torch.float32",
        ),
        (
            lambda t: t | {f"{UP}.nested_absmax": t[f"{UP}.nested_absmax"] * torch.nan},
            f"quantized.safetensors: {UP}.nested_absmax must be finite",
        ),
        (
            lambda t: t | {f"{UP}._extra_state": torch.tensor([1], dtype=torch.uint8)},
            f"{UP}._extra_state: ",
        ),
        (
            lambda t: t | {f"{UP}._extra_state": t[f"{DOWN}._extra_state"].clone()},
            f"{UP}._extra_state: state_dict must hold a weight with",
        ),
    ],
    ids=[
        "extra",
        "codes",
        "offset",
        "meaning",
        "dense",
        "shape",
        "dtype",
        "NaN",
        "no JSON",
        "meant",
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Callable[..., Any], message: str) -> None:
    file = folder / "quantized.safetensors"
    save_file(change(load_file(file)), file)
    assert message in refusal(folder)


def dropped(tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    file = folder / "quantized.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "quantized.safetensors: truncated or not a safetensors file" in refusal(folder)
    shutil.move(file, folder / "model.safetensors")
    assert "quantized.safetensors: no such file" in refusal(folder)
    shutil.move(folder / "model.safetensors", file)
    file.write_bytes(whole)
    edit(folder, num_hidden_layers=3)
    assert "model.layers.2.self_attn.q_proj.weight is missing" in refusal(folder)
    edit(folder, num_hidden_layers=2, model_type="nothing")
    assert "config.json: The checkpoint you are trying to load" in refusal(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        loaded(folder)


def test_null_is_not_taken_for_an_empty_field(folder: Path) -> None:
    given = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config=given | {"other_dtypes": None})
    for read in (loaded, load_tokenizer):
        with pytest.raises(ValueError, match="other_dtypes must be of type dict; got None"):
            read(folder)


@pytest.mark.parametrize(
    "changes", [{"dtype": "foo"}, {"hidden_size": "64"}, {"hidden_act": "none"}], ids=str
)
def test_wrong_values_of_the_model_are_blamed_on_config_json(
    folder: Path, changes: dict[str, Any]
) -> None:
    edit(folder, **changes)
    assert "config.json: " in refusal(folder)


def test_two_tensors_for_one_are_refused(folder: Path) -> None:
    """By whichever name comes last in the file the other would be lost."""
    edit(folder, tie_word_embeddings=True)
    both = "lm_head.weight and model.embed_tokens.weight are one tensor by config.json and two in"
    assert both in refusal(folder)
