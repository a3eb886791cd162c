"""Folders in 4 bits: they give what the dense folder gives, and say what is wrong with them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from qlora import (
    QLoRAConfig,
    load_adapter,
    merge,
    pretrained,
    quantize_model,
    quantized_folder,
    save_adapter,
    shards,
)
from qlora.evaluation import evaluate
from qlora.pretrained import base_settings, load_quantized, load_tokenizer, quantize_folder
from tests import tiny
from tests.test_loading import MODELS, all_tensors, assert_same, build, save

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"rank": 2, "blocksize": 32} | settings)


def make(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    folder = save(build(name).to(dtype), tmp_path / "dense")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in 4 bits, of several files, to be damaged."""
    quantize_folder(make(tmp_path), tmp_path / "folder", config())
    return tmp_path / "folder"


def loaded(folder: Path, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    return load_quantized(folder, config(**settings), precision="float32")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_it_loads_as_the_dense_folder_does(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    dense, out = make(tmp_path, name, dtype), tmp_path / "out"
    quantize_folder(dense, out, config())
    torch.manual_seed(5)
    ours, report = load_quantized(out, config(), precision="float32")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    theirs, expected = load_quantized(dense, config(), precision="float32")
    assert torch.equal(drawn, torch.rand(3))
    assert report == expected
    assert_same(ours, theirs)
    one, other = ours.config.to_dict(), theirs.config.to_dict()
    assert one | {"_name_or_path": ""} == other | {"_name_or_path": ""}
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int4", "blocksize": 64},
        {"double_quant": False},
        {"scale_format": "e4m3"},
    ],
    ids=str,
)
def test_what_the_base_is_comes_from_the_folder(tmp_path: Path, settings: dict[str, Any]) -> None:
    dense, out = make(tmp_path), tmp_path / "out"
    report = quantize_folder(dense, out, config(**settings, rank=7, target_modules=("q_proj",)))
    assert (report.adapted, report.trainable_parameters) == ((), 0)
    base = {"format": "nf4", "blocksize": 32, "double_quant": True, "scale_format": "dynamic8"}
    base |= settings
    if not base["double_quant"]:
        del base["scale_format"]
    assert (base_settings(dense), base_settings(out)) == ({}, base)
    assert_same(loaded(out, **base_settings(out)), loaded(dense, **settings))
    with pytest.raises(ValueError, match=r"out: is quantized already, with format='\w+', block"):
        loaded(out, format="fp4")
    assert torch.equal(
        load_quantized(out, config(**settings), precision="bfloat16")[0].model.norm.weight,
        load_quantized(dense, config(**settings), precision="bfloat16")[0].model.norm.weight,
    )


def test_the_report_is_of_the_folder(tmp_path: Path) -> None:
    dense, out = make(tmp_path), tmp_path / "out"
    report = quantize_folder(dense, out, config())
    tensors = load_file(out / "quantized.safetensors")
    meanings = sum(t.nbytes for key, t in tensors.items() if key.endswith("_extra_state"))
    model = loaded(out)
    tables = sum(b.nbytes for _, b in model.model.rotary_emb.named_buffers())
    assert report.bytes_after == sum(t.nbytes for t in tensors.values()) - meanings + tables
    assert {t.dtype for key, t in tensors.items() if "norm" in key} == {torch.bfloat16}
    assert not any("lora" in key for key in tensors)


def test_an_adapter_goes_from_one_to_the_other(tmp_path: Path) -> None:
    dense, out = make(tmp_path), tmp_path / "out"
    quantize_folder(dense, out, config())
    for here, there in ((dense, out), (out, dense)):
        trained = tiny.randomize_adapter(loaded(here))
        save_adapter(trained, tmp_path / "adapter")
        other = loaded(there)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_adapter(other, tmp_path / "adapter")
        assert evaluate(other, tiny.examples()) == evaluate(trained, tiny.examples())
        merged = [
            pretrained.place(merge(model, torch.bfloat16), "cpu", torch.bfloat16)
            for model in (trained, other)
        ]
        assert_same(*merged)
        for model, name in zip(merged, ("one", "other"), strict=True):
            model.save_pretrained(tmp_path / name)
        one, other = ((tmp_path / name / "config.json").read_text() for name in ("one", "other"))
        assert one == other
        assert "quantization_config" not in one


def test_what_transformers_keeps_in_fp32_stays_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dtypes then differ from those of the model that config.json makes."""
    monkeypatch.setattr(
        hf.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["up_proj", "norm"], raising=False
    )
    dense, out = make(tmp_path, dtype=torch.float32), tmp_path / "out"
    edit(dense, dtype="bfloat16")
    quantize_folder(dense, out, config())
    others = json.loads((out / "config.json").read_text())["quantization_config"]["other_dtypes"]
    assert others[f"{UP}.weight"] == others["model.norm.weight"] == "float32"
    assert "lm_head.weight" not in others
    ours, theirs = loaded(out), loaded(dense)
    assert_same(ours, theirs)
    assert ours.get_submodule(UP).base_dtype == torch.float32
    assert ours.lm_head.weight.dtype == torch.float32, "the computation's"


def test_several_files_and_one_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make(tmp_path)
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda *arguments: write(*arguments, 50_000))
    quantize_folder(dense, tmp_path / "several", config())
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    assert_same(loaded(tmp_path / "several"), loaded(dense))


def test_plain_transformers_makes_no_random_model_of_it(folder: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    dense, out = make(tmp_path), tmp_path / "out"
    monkeypatch.setattr(pretrained, "copy_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize_folder(dense, out, config())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_files_that_the_model_needs_are_there(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(folder)("a") == load_tokenizer(tmp_path / "dense")("a")
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


# --- What is refused --------------------------------------------------------------------------------


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
    edit(dense, quantization_config={"quant_method": "bitsandbytes"})
    for call in (loaded, lambda path: quantize_folder(path, tmp_path / "new", config())):
        with pytest.raises(ValueError, match=r"quantized already \(bitsandbytes\)"):
            call(dense)
    model = build("llama")
    with pytest.raises(ValueError, match="model must hold quantized layers"):
        quantized_folder.save(model, tmp_path / "dense", tmp_path / "new")
    quantize_model(model.model, config())
    model.model.layers[0].mlp.up_proj.format = "int4"
    with pytest.raises(ValueError, match="all with the same format and scales"):
        quantized_folder.save(model, tmp_path / "dense", tmp_path / "new")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "quantization_config has an unknown field 'colour'"),
        ({"format": None}, "quantization_config must have format"),
        ({"scale_format": None}, "quantization_config must have scale_format"),
        ({"dtype": None}, "quantization_config must have dtype"),
        ({"format": "nf3"}, "nf3"),
        ({"blocksize": "64"}, "blocksize must be of type int"),
        ({"dtype": "float8"}, "dtype must be one of float64, float32, float16, bfloat16; got"),
        ({"other_dtypes": {f"{UP}.weight": "int8"}}, "dtype must be one of"),
        ({"other_dtypes": ["a"]}, "config.json: quantization_config: "),
        ({"other_dtypes": {"a.weight": "float32"}}, "other_dtypes: no parameter 'a.weight'"),
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
            lambda t: t | {f"{UP}._extra_state": torch.tensor([1], dtype=torch.uint8)},
            f"{UP}._extra_state: ",
        ),
        (
            lambda t: t | {f"{UP}._extra_state": t[f"{DOWN}._extra_state"].clone()},
            f"{UP}._extra_state: state_dict must hold a weight with",
        ),
    ],
    ids=["extra", "codes", "offset", "meaning", "dense", "shape", "dtype", "no JSON", "meant"],
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
    assert "model.layers.2.self_attn.q_proj.packed is missing" in refusal(folder)
    edit(folder, num_hidden_layers=2, model_type="nothing")
    assert "cannot make the model of config.json" in refusal(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        loaded(folder)


def test_nothing_of_a_load_is_in_the_files_map(folder: Path) -> None:
    model = loaded(folder)
    before = {name: tensor.clone() for name, tensor in all_tensors(model).items()}
    file = folder / "quantized.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(model).items())
