"""Folders in 4 bits: they give what the dense folder gives, and say what is wrong with them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from qlora import (
    QLoRAConfig,
    load_adapter,
    merge,
    pretrained,
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
    """A folder in 4 bits."""
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


def test_buffers_that_transformers_keeps_in_fp32_stay_in_fp32(tmp_path: Path) -> None:
    dense, out = save(deepseek().bfloat16(), tmp_path / "dense"), tmp_path / "out"
    with pytest.warns(UserWarning, match="has no tokenizer files to copy"):
        quantize_folder(dense, out, config())
    others = json.loads((out / "config.json").read_text())["quantization_config"]["other_dtypes"]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert others == {name: "float32"}
    ours = loaded(out)
    assert dict(ours.named_buffers())[name].dtype == torch.float32
    with pytest.warns(UserWarning, match="read as a whole"):
        assert_same(ours, loaded(dense))


def deepseek() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes)).eval()


def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had the description missed something, the folder would be of no use."""
    dense = make(tmp_path)
    describe = quantized_folder._describe

    def forget(*arguments: Any) -> dict[str, Any]:
        return describe(*arguments) | {"dtype": "float32"}

    monkeypatch.setattr(quantized_folder, "_describe", forget)
    said = (
        r"dense: its model cannot be read back in 4 bits: what was written/quantized[\w.-]*safetensors: "
        r"lm_head\.weight must have dtype torch\.float32; got torch\.bfloat16"
    )
    with pytest.raises(ValueError, match=said):
        quantize_folder(dense, tmp_path / "out", config())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


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


def test_what_is_no_file_is_not_copied(tmp_path: Path) -> None:
    dense = make(tmp_path)
    for name in ("tokens", "chat_templates"):
        (dense / name).mkdir()
    quantize_folder(dense, tmp_path / "out", config())
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())
    for file in dense.glob("token*.json"):
        file.unlink()
    with pytest.warns(UserWarning, match="dense: has no tokenizer files to copy"):
        quantize_folder(dense, tmp_path / "other", config())
    assert (tmp_path / "other" / "chat_template.jinja").is_file()


def test_what_fails_fails_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("quantized")

    monkeypatch.setattr(pretrained, "quantize_model", work)
    dense = make(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        quantize_folder(dense, tmp_path / "file" / "out", config())
    (dense / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: not valid JSON"):
        quantize_folder(dense, tmp_path / "out", config())


def test_a_link_to_where_it_goes_is_kept(tmp_path: Path) -> None:
    dense, link = make(tmp_path), tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "out")
    quantize_folder(dense, link, config())
    assert link.is_symlink()
    assert_same(loaded(link), loaded(dense))


def test_nothing_of_a_load_is_in_the_files_map(folder: Path) -> None:
    model = loaded(folder)
    before = {name: tensor.clone() for name, tensor in all_tensors(model).items()}
    file = folder / "quantized.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(model).items())


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
