"""Folders in bitsandbytes' layout, against transformers with bitsandbytes: read, written, and refused when damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paper_repro import interchange
from qlora import QLoRAConfig, QLoRALinear, bnb, quantize_model, shards
from qlora.__main__ import main
from qlora.adapter_files import save_adapter
from qlora.bnb_format import to_bitsandbytes
from qlora.lora_layer import LoRALayer
from qlora.merging import requantize
from qlora.modules import LoRALinear
from qlora.placing import base_tensors
from qlora.pretrained import base_settings, load_dense, load_quantized, quantize_folder
from tests import tiny
from tests.test_bnb_format import assert_equal, default_dtype
from tests.test_loading import MERGED, all_tensors, build, save

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
BOTH_WAYS = [
    ("llama", torch.bfloat16, {}),
    ("llama, biases and long", torch.float16, {"double_quant": False}),
    ("llama, tied", torch.float32, {"format": "fp4"}),
    ("gpt2", torch.float32, {}),  # Conv1D, tied
    ("opt", torch.float16, {"format": "fp4", "double_quant": False}),
    ("qwen3", torch.bfloat16, {}),
    ("gemma", torch.bfloat16, {"double_quant": False}),
    ("phi", torch.float32, {}),
    ("gpt_neox", torch.float16, {}),  # renamed by transformers
]


def dense_folder(tmp_path: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    folder = save(build(name).to(dtype), tmp_path / "dense")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def their_quantized(
    dense: Path, format: str = "nf4", double_quant: bool = True, **settings: Any
) -> nn.Module:
    """Quantized by transformers with bitsandbytes. No forward may run before it is saved: one changes the weights."""
    config = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=double_quant,
        **settings,
    )
    return read_by_them(dense, quantization_config=config)


def read_by_them(folder: Path, **settings: Any) -> nn.Module:
    model, found = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **settings
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def their_folder(tmp_path: Path, shard: str = "20KB", **settings: Any) -> tuple[Path, nn.Module]:
    model, folder = their_quantized(dense_folder(tmp_path), **settings), tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file written by transformers with bitsandbytes."""
    return their_folder(tmp_path, "1GB")[0]


def read(folder: Path, **settings: Any) -> nn.Module:
    config = QLoRAConfig(**{"rank": 2, "target_modules": None} | base_settings(folder) | settings)
    return load_quantized(folder, config, precision="float32")[0]


def assert_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Each 4-bit weight bit for bit with its dtype; all else the same numbers (ours may be in a wider dtype)."""
    state, seen = theirs.state_dict(), set()
    for name, layer in ours.named_modules():
        if isinstance(layer, QLoRALinear):
            written = to_bitsandbytes(layer.weight, name=f"{name}.weight")
            assert_equal(written, {key: state[key] for key in written})
            seen |= written.keys()
    assert seen
    for name, tensor in base_tensors(ours).items():
        if name in state and name not in seen and not name.endswith(".absmax"):
            assert torch.equal(tensor, state[name].to(tensor.dtype)), name
            seen.add(name)
    assert seen == state.keys()


@pytest.mark.parametrize(("name", "dtype", "settings"), BOTH_WAYS)
def test_theirs_loads_here(
    tmp_path: Path, name: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    model = their_quantized(dense_folder(tmp_path, name, dtype), **settings)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    base = {"format": "nf4", "blocksize": 64, "double_quant": True} | settings
    if base["double_quant"]:
        base["scale_format"] = "dynamic8"
    assert base_settings(tmp_path / "theirs") == base
    ours = read(tmp_path / "theirs")
    assert_alike(ours, model)
    assert not any(hasattr(m.config, "quantization_config") for m in (ours, ours.base_model))


@pytest.mark.parametrize(("name", "dtype", "settings"), BOTH_WAYS)
def test_ours_loads_there(
    tmp_path: Path, name: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    dense, out = dense_folder(tmp_path, name, dtype), tmp_path / "out"
    config = QLoRAConfig(**{"blocksize": 32} | settings)
    report = quantize_folder(dense, out, config, layout="bitsandbytes")
    assert not report.adapted
    theirs = read_by_them(out)
    ours = load_quantized(dense, QLoRAConfig(rank=2, **vars_of(config)), precision="float32")[0]
    assert_alike(ours, theirs)
    assert_alike(read(out), theirs)
    assert not list((out).glob("quantized*"))


def vars_of(config: QLoRAConfig) -> dict[str, Any]:
    return {
        "format": config.format,
        "blocksize": config.blocksize,
        "double_quant": config.double_quant,
    }


@pytest.mark.parametrize("blocksize", [128, 1024, 4096])
def test_every_block_size_goes_there_and_back(tmp_path: Path, blocksize: int) -> None:
    dense, out = dense_folder(tmp_path), tmp_path / "out"
    quantize_folder(dense, out, QLoRAConfig(blocksize=blocksize), layout="bitsandbytes")
    assert base_settings(out)["blocksize"] == blocksize
    assert_alike(read(out), read_by_them(out))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_other_storage_dtypes(tmp_path: Path, storage: torch.dtype) -> None:
    there, model = their_folder(tmp_path, bnb_4bit_quant_storage=storage)
    assert load_file(next(there.glob("*.safetensors")))
    ours = read(there)
    for name, layer in ours.named_modules():
        if isinstance(layer, QLoRALinear):
            given = model.get_submodule(name).state_dict(prefix="")
            assert given["weight"].dtype == storage
            assert_equal(to_bitsandbytes(layer.weight, storage), given)
    (tmp_path / "out").mkdir()
    bnb.save(ours, there, tmp_path / "out", storage)
    again = read_by_them(tmp_path / "out")
    assert again.get_submodule(UP).weight.dtype == storage
    assert_equal(again.get_submodule(UP).state_dict(), model.get_submodule(UP).state_dict())


def test_the_default_dtype_does_not_matter(tmp_path: Path) -> None:
    there, model = their_folder(tmp_path)
    with default_dtype(torch.bfloat16):
        ours = read(there)
    assert_alike(ours, model)


def test_what_the_files_hold_dense_stays_dense_and_the_rest_is_in_4_bits(tmp_path: Path) -> None:
    """As in "dynamic" quants; transformers quantizes the output embedding as well where the list lacks it."""
    skipped = ["model.layers.0.mlp", "k_proj"]
    there, model = their_folder(tmp_path, llm_int8_skip_modules=skipped)
    config = QLoRAConfig(rank=2, **base_settings(there))
    ours, report = load_quantized(there, config, precision="float32")
    assert_alike(ours, model)
    assert isinstance(ours.lm_head, QLoRALinear)
    assert "lm_head" in report.quantized
    assert "lm_head" not in report.adapted
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.k_proj"):
        assert isinstance(ours.get_submodule(name), LoRALinear)
        assert name in report.adapted
        assert name not in report.quantized
    assert len(report.quantized) == 1 + 14 - 3 - 2 + 0
    (tmp_path / "out").mkdir()
    bnb.save(tiny.randomize_adapter(ours), there, tmp_path / "out")
    assert_alike(ours, read_by_them(tmp_path / "out"))
    plain = read(there)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear


def test_dense_conv1d_with_an_adapter_lies_as_the_model_has_it(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path, "gpt2", torch.float32)
    their_quantized(dense, llm_int8_skip_modules=["c_attn", "lm_head"]).save_pretrained(
        tmp_path / "theirs"
    )
    ours = read(tmp_path / "theirs", target_modules="all-linear")
    layer = ours.transformer.h[0].attn.c_attn
    assert isinstance(layer, LoRALinear)
    assert torch.equal(layer.weight, load_dense(dense).transformer.h[0].attn.c_attn.weight.mT)
    (tmp_path / "out").mkdir()
    bnb.save(ours, dense, tmp_path / "out")
    theirs = read_by_them(tmp_path / "out")
    assert torch.equal(theirs.transformer.h[0].attn.c_attn.weight.mT, layer.weight)


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ("q_proj", "lm_head")}, {"modules_to_save": ("lm_head", "norm")}],
    ids=str,
)
def test_what_adapters_do_to_dense_modules_is_left_out(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    dense, out = dense_folder(tmp_path, "llama, tied", torch.float32), tmp_path / "out"
    model = load_dense(dense)
    quantize_model(model, QLoRAConfig(rank=2, **settings))
    out.mkdir()
    bnb.save(tiny.randomize_adapter(model), dense, out)
    theirs = read_by_them(out)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert_alike(model, theirs)
    assert_alike(read(out, **settings | {"target_modules": "all-linear"}), theirs)


def test_several_files_are_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, out, write = dense_folder(tmp_path), tmp_path / "out", shards.write
    monkeypatch.setattr(shards, "write", lambda *arguments: write(*arguments, 20_000))
    quantize_folder(dense, out, QLoRAConfig(), layout="bitsandbytes")
    assert len(list(out.glob("model-*.safetensors"))) > 3
    theirs = read_by_them(out)
    assert_alike(read(out), theirs)
    assert {tensor.dtype for tensor in load_shards(out).values()} == {
        torch.uint8,
        torch.float32,
        torch.bfloat16,
    }


def load_shards(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def test_it_is_described_as_transformers_does(tmp_path: Path) -> None:
    there, _ = their_folder(tmp_path, bnb_4bit_compute_dtype=torch.bfloat16)
    out = tmp_path / "out"
    quantize_folder(tmp_path / "dense", out, QLoRAConfig(), layout="bitsandbytes")
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, there))
    assert ours["quantization_config"].pop("llm_int8_skip_modules") == ["lm_head"]
    assert theirs["quantization_config"].pop("llm_int8_skip_modules") is None
    assert ours == theirs
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_stacked_experts_stay_dense_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, out = tmp_path / "dense", tmp_path / "out"
    save(hf.MixtralForCausalLM(MERGED).bfloat16(), dense)
    with pytest.warns(UserWarning, match="read as a whole|no tokenizer files"):
        quantize_folder(dense, out, QLoRAConfig(), layout="bitsandbytes")
    theirs = read_by_them(out)
    experts = theirs.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts, load_dense(dense).model.layers[0].mlp.experts.gate_up_proj)
    assert_alike(read(out), theirs)
    adapted = read(out, target_modules="all-linear")
    stack = adapted.model.layers[0].mlp.experts.gate_up_proj
    assert all(isinstance(layer, LoRALinear) for layer in stack)
    assert torch.equal(torch.stack([layer.weight for layer in stack]), experts.float())
    with pytest.raises(ValueError, match=r"mlp\.experts: experts one by one are not in the layout"):
        bnb.save(adapted, out, tmp_path)
    their_quantized(dense).save_pretrained(tmp_path / "split")  # a tensor for each expert
    with pytest.raises(
        ValueError, match=r"merges or splits weights.*not supported in the layout of"
    ):
        read(tmp_path / "split")


def test_nothing_of_a_load_is_in_the_files_map(folder: Path) -> None:
    model = read(folder)
    before = {name: tensor.clone() for name, tensor in all_tensors(model).items()}
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(model).items())


def test_it_is_a_model_for_every_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there, _ = their_folder(tmp_path)
    data = tiny.write_lines(tmp_path / "data.jsonl", [{"prompt": "1+1=", "completion": "2."}] * 8)
    adapter, merged, out = tmp_path / "adapter", tmp_path / "merged", tmp_path / "out"
    on_cpu = ["--device", "cpu"]
    assert (
        main(
            [
                "finetune",
                f"{there}",
                f"{data}",
                "--output",
                f"{adapter}",
                "--steps",
                "2",
                *on_cpu,
                "--rank",
                "2",
                "--max-length",
                "32",
            ]
        )
        == 0
    )
    assert main(["evaluate", f"{there}", f"{data}", "--adapter", f"{adapter}", *on_cpu]) == 0
    assert main(["merge", f"{there}", f"{adapter}", f"{merged}"]) == 0
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    read_by_them(merged)
    capfd.readouterr()
    command = ["quantize", f"{merged}", f"{out}", "--layout", "bitsandbytes", *on_cpu]
    assert main([*command, "--format", "int4"]) == 2
    assert "format must be nf4 or fp4 for bitsandbytes; got 'int4'" in capfd.readouterr().err
    assert main(command) == 0
    assert_alike(read(out), read_by_them(out))


@pytest.mark.parametrize("settings", [{}, {"format": "fp4", "double_quant": False}], ids=str)
def test_they_compute_with_it_what_we_do(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Rows of whole blocks: their decoding on a CPU errs where a block ends within a row."""
    dense = tiny.model_folder(tmp_path / "dense", tiny.llama(intermediate_size=128))
    config = QLoRAConfig(target_modules=None, **settings)
    found = interchange.compare(dense, [tiny.examples()], config)
    assert found["equal"] == found["weights"] == 14
    assert found["theirs"]["tokens"] == found["ours"]["tokens"] > 0
    assert found["theirs"]["nll"] == pytest.approx(found["ours"]["nll"], abs=1e-6)


# --- What is refused --------------------------------------------------------------------------------


def test_what_cannot_be_written_fails_before_the_work(tmp_path: Path) -> None:
    dense, out = dense_folder(tmp_path), tmp_path / "out"
    for settings, message in (
        ({"format": "e2m1"}, "format must be nf4 or fp4 for bitsandbytes; got 'e2m1'"),
        ({"scale_format": "e4m3"}, "scale_format must be dynamic8 for bitsandbytes; got 'e4m3'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_folder(dense, out, QLoRAConfig(**settings), layout="bitsandbytes")
    with pytest.raises(ValueError, match="layout must be qlora or bitsandbytes; got 'gguf'"):
        quantize_folder(dense, out, QLoRAConfig(), layout="gguf")
    assert not out.exists()
    model = load_dense(dense)
    with pytest.raises(ValueError, match="model must hold quantized layers; call quantize_model"):
        bnb.save(model, dense, out)
    quantize_model(model, QLoRAConfig(format="e3m0", rank=1))
    with pytest.raises(
        ValueError, match=r"q_proj: format must be nf4 or fp4 for bitsandbytes; got"
    ):
        bnb.save(model, dense, out)


def test_what_transformers_keeps_dense_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hf.LlamaPreTrainedModel, "_keep_in_fp32_modules", ["up_proj"], raising=False
    )
    dense, out = dense_folder(tmp_path), tmp_path / "out"
    model = load_dense(dense)
    quantize_model(model, QLoRAConfig(rank=1))
    with pytest.raises(ValueError, match="up_proj: transformers keeps this layer dense"):
        bnb.save(model, dense, out)
    quantize_folder(dense, out, QLoRAConfig(), layout="bitsandbytes")
    theirs = read_by_them(out)
    assert type(theirs.get_submodule(UP)) is nn.Linear
    assert_alike(read(out), theirs)


def test_it_is_quantized_already(folder: Path, tmp_path: Path) -> None:
    for call in (load_dense, lambda path: quantize_folder(path, tmp_path / "new", QLoRAConfig())):
        with pytest.raises(
            ValueError, match=r"quantized already \(bitsandbytes\), a dense model is"
        ):
            call(folder)
    for settings in ({"format": "fp4"}, {"blocksize": 32}, {"double_quant": False}):
        with pytest.raises(
            ValueError, match=f"is quantized already, with .*{next(iter(settings))}="
        ):
            read(folder, **settings)
    with pytest.raises(ValueError, match="init='pissa' starts from the weights before that"):
        read(folder, init="pissa", target_modules="all-linear")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    given = json.loads(path.read_text())
    given["quantization_config"] |= changes
    path.write_text(json.dumps(given))


def test_the_oldest_configs_do_not_name_the_method(folder: Path) -> None:
    expected = read(folder).state_dict()
    path = folder / "config.json"
    given = json.loads(path.read_text())
    del given["quantization_config"]["quant_method"]
    path.write_text(json.dumps(given))
    assert_equal(read(folder).state_dict(), expected)
    path.write_text(json.dumps(given | {"quantization_config": "bitsandbytes"}))
    with pytest.raises(
        ValueError, match=r"config\.json: quantization_config must be a JSON object"
    ):
        read(folder)


@pytest.mark.parametrize("skipped", [["down_proj", "lm_head"], ["none of them"]])
def test_the_same_layers_are_in_4_bits_after_an_adapter_was_added_in(
    tmp_path: Path, skipped: list[str]
) -> None:
    """Some that we would quantize are dense; or the output embedding is in 4 bits, which we would leave dense."""
    folder, _ = their_folder(tmp_path, llm_int8_skip_modules=skipped)
    model = tiny.randomize_adapter(read(folder, target_modules="all-linear"))
    save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "out"
    options = [str(folder), str(tmp_path / "adapter"), str(out), "--requantize"]
    assert main(["merge", *options, "--dtype", "float32"]) == 0
    requantize(model)
    found = read(out)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALayer):
            got = found.get_submodule(name)
            assert isinstance(got, QLoRALinear) == isinstance(layer, QLoRALinear), name
    assert torch.equal(tiny.logits(found, tiny.tokens()), tiny.logits(model, tiny.tokens()))


def test_an_empty_quantization_config_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(ValueError, match=r"config\.json: quantization_config is empty"):
        read(folder)


def test_eight_bits_are_refused(folder: Path) -> None:
    edit(folder, load_in_8bit=True, load_in_4bit=False)
    with pytest.raises(
        ValueError, match=r"config\.json: the model is in 8 bits \(LLM\.int8\), which"
    ):
        read(folder)
    edit(folder, load_in_8bit=False)
    change(folder, lambda t: t | {f"{UP}.SCB": torch.ones(4)})
    with pytest.raises(ValueError, match=re.escape(f"{UP}.SCB: belongs to a weight in 8 bits")):
        read(folder)


def change(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(*keys: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: t for key, t in tensors.items() if key not in keys}


STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(f"{UP}.weight"), f"{UP}.weight: missing, although {UP}.weight.absmax is there"),
        (without(STATE), f"{UP}.weight: needs one of {STATE} or "),
        (
            without(f"{UP}.weight.absmax"),
            f"{UP}.weight.absmax: missing, although {UP}.weight is in",
        ),
        (without(f"{UP}.weight.nested_absmax"), f"{UP}.weight.nested_absmax: missing"),
        (without(f"{UP}.bias", "model.norm.weight"), "model.norm.weight is missing in the files"),
        (lambda t: t | {STATE: t[STATE][:-1]}, f"{STATE}: is no JSON"),
        (
            lambda t: t | {STATE: t[STATE.replace(UP, DOWN)].clone()},
            f"{UP}.weight: weight must have shape",
        ),
        (
            lambda t: t | {f"{UP}.weight": t[f"{UP}.weight"][:-1]},
            f"{UP}.weight: must have shape (3072, 1)",
        ),
        (lambda t: t | {"model.foo": torch.ones(1)}, "model.foo is not in config.json's model"),
        (
            lambda t: t | {f"{UP}.{k}": v for k, v in other("fp4").items()},
            f"{UP}.weight: needs one of",
        ),
        (
            lambda t: without(STATE)(t) | {f"{UP}.{k}": v for k, v in other("fp4").items()},
            f"{UP}.weight: weight must have format 'nf4'; got 'fp4'",
        ),
        (
            lambda t: t | {f"{UP}.{k}": v for k, v in other("nf4", blocksize=128).items()},
            f"{UP}.weight: weight must have blocksize 64; got 128",
        ),
        (
            lambda t: t | {f"model.embed_tokens.{k}": v for k, v in other("nf4", n=258).items()},
            "model.embed_tokens is in 4 bits in the files and no linear layer, which is not supported",
        ),
    ],
    ids=range(13),
)
def test_damage_is_named(
    folder: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    change(folder, damage)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("prefix", ["base_model.model.", "module."])
def test_names_of_a_wrapped_model_are_refused_with_the_cause(folder: Path, prefix: str) -> None:
    change(folder, lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items()})
    with pytest.raises(
        ValueError, match=rf"{prefix}\S+ has the prefix of what the model was wrapped"
    ):
        read(folder)


def other(format: str, n: int = 96, blocksize: int = 64) -> dict[str, Tensor]:
    from qlora import quantize_4bit

    return to_bitsandbytes(quantize_4bit(torch.randn(n, 64), format, blocksize))


def test_no_weight_in_4_bits_is_named(folder: Path) -> None:
    change(folder, lambda t: {key: t[key] for key in ("lm_head.weight",)})
    with pytest.raises(
        ValueError, match=r"config\.json says bitsandbytes, and the files hold no weight"
    ):
        read(folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(
        ValueError, match=r"model\.safetensors: truncated or not a safetensors file"
    ):
        read(folder)


def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, state_dict = dense_folder(tmp_path), bnb.state_dict
    monkeypatch.setattr(bnb, "state_dict", lambda *a: without("model.norm.weight")(state_dict(*a)))
    said = r"dense: its model cannot be read back in the layout of bitsandbytes: model\.norm\.weight is"
    with pytest.raises(ValueError, match=said):
        quantize_folder(dense, tmp_path / "out", QLoRAConfig(), layout="bitsandbytes")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
