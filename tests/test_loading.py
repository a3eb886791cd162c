"""Quantizing while loading gives, bit for bit, what loading and then quantizing gives."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from qlora import QLoRAConfig, QLoRALinear, loading, pretrained, quantize_model, shards
from qlora.pretrained import load_quantized
from qlora.tensor_names import NotStreamable
from tests import tiny

CPU = torch.device("cpu")
SIZES = {"vocab_size": 258, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
FEED = SIZES | {"intermediate_size": 96}
GROUPED = FEED | {"num_key_value_heads": 2}
GPT = {"vocab_size": 258, "n_embd": 64, "n_layer": 2, "n_head": 4}
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama, biases and long": (
        "Llama",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LONG_ROPE},
    ),
    "llama, tied": ("Llama", FEED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT | {"n_positions": 64}),  # Conv1D
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),  # its tables are rounded in the model's dtype
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
    "mistral": ("Mistral", GROUPED),
    "gemma": ("Gemma", GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 16}),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", GROUPED | {"pad_token_id": 0}),
    "opt": ("OPT", SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"vocab_size": 258, "hidden_size": 64, "n_head": 4, "n_layer": 2}),
    "gpt_neox": ("GPTNeoX", FEED),  # transformers renames its output embedding
}
MERGED = hf.MixtralConfig(**GROUPED, num_local_experts=4)


def build(name: str) -> nn.Module:
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(hf, f"{kind}Config")(**sizes)
    return hf.AutoModelForCausalLM.from_config(settings).eval()


def save(model: nn.Module, folder: Path, shard: str = "60KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"rank": 2, "blocksize": 32} | settings)


def streamed(folder: Path, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    convert = partial(quantize_model, config=config(**settings))
    return loading.load_and_quantize(folder, convert, CPU, torch.float32)


def dense(folder: Path, **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    model = pretrained.load_dense(folder)
    report = quantize_model(model, config(**settings))
    return pretrained.place(model, "cpu", torch.float32), report


def all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are in no state dict included."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = all_tensors(left), all_tensors(right)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad, name
    assert len(list(left.parameters())) == len(list(right.parameters())), "tied alike"
    for one, other in zip(left.modules(), right.modules(), strict=True):
        assert one.training == other.training
        if isinstance(one, QLoRALinear):
            assert one.base_dtype == other.base_dtype
    assert torch.equal(tiny.logits(left, tiny.tokens()), tiny.logits(right, tiny.tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_dense_path_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Codes, scales, embeddings, tables, adapters, report, outputs; and torch's generator after it."""
    folder = save(build(name).to(dtype), tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = streamed(folder)
    drawn = torch.rand(3)
    theirs = dense(folder)
    assert torch.equal(drawn, torch.rand(3))
    assert ours[1] == theirs[1]
    assert_same(ours[0], theirs[0])
    assert ours[0].config.to_dict() == theirs[0].config.to_dict()
    assert ours[0].name_or_path == theirs[0].name_or_path
    assert ours[0].generation_config.to_dict() == theirs[0].generation_config.to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int4", "double_quant": False},
        {"scale_format": "e4m3", "adapter_dtype": "bfloat16"},
        {"target_modules": ("q_proj", "mlp.up_proj")},
        {"dora": True, "rank_pattern": {"up_proj": 3}, "target_modules": ("up_proj", "lm_head")},
        {"init": "pissa", "init_iterations": 2},
        {"init": "loftq", "adapter_dtype": "bfloat16"},
        {"init": "pissa", "target_modules": ("q_proj", "lm_head")},
    ],
    ids=str,
)
def test_every_setting_arrives(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save(build("llama").bfloat16(), tmp_path, "1GB")
    ours, theirs = streamed(folder, **settings), dense(folder, **settings)
    assert ours[1] == theirs[1]
    assert_same(ours[0], theirs[0])


@pytest.mark.parametrize("declared", ["bfloat16", None, "float64"])
def test_the_dtype_is_what_config_json_says(tmp_path: Path, declared: str | None) -> None:
    """Weights in another one are rounded to it first, as transformers does; the files' where it says none."""
    folder = save(build("llama"), tmp_path)
    edit(folder, dtype=declared)
    ours, theirs = streamed(folder), dense(folder)
    assert ours[1] == theirs[1]
    assert_same(ours[0], theirs[0])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_keys_of_older_folders_are_known(tmp_path: Path) -> None:
    """Tables that are worked out today, and a base model's keys without its prefix."""
    llama = save(build("llama"), tmp_path / "llama", "1GB")
    rewrite(llama, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    gpt2 = save(build("gpt2"), tmp_path / "gpt2", "1GB")
    rewrite(gpt2, lambda t: {key.removeprefix("transformer."): v for key, v in t.items()})
    for folder in (llama, gpt2):
        ours = streamed(folder)
        assert_same(ours[0], dense(folder)[0])


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t | {"extra": torch.ones(2)}, "extra is not in config.json's model"),
        (
            lambda t: {key: v for key, v in t.items() if "0.mlp.up_proj" not in key},
            "model.layers.0.mlp.up_proj.weight is missing in the files",
        ),
        (
            lambda t: t | {"lm_head.weight": torch.ones(258, 32)},
            r"lm_head.weight is \(258, 32\) in the files and \(258, 64\) by config.json",
        ),
        (
            lambda t: t | {"lm_head.weight": torch.ones(258, 64, dtype=torch.int32)},
            "lm_head.weight has another dtype than torch.float32",
        ),
    ],
    ids=["extra", "missing", "misshapen", "integers"],
)
def test_what_does_not_fit_is_left_to_transformers(
    tmp_path: Path, change: Callable[..., Any], reason: str
) -> None:
    folder = save(build("llama"), tmp_path, "1GB")
    rewrite(folder, change)
    with pytest.raises(NotStreamable, match=reason):
        streamed(folder)


def test_modules_that_are_trained_whole_get_their_copies(tmp_path: Path) -> None:
    folder = save(build("llama, tied"), tmp_path, "1GB")
    settings = {"modules_to_save": ("lm_head", "layers.1.mlp", "norm")}
    ours, theirs = streamed(folder, **settings), dense(folder, **settings)
    assert ours[1] == theirs[1]
    assert_same(ours[0], theirs[0])
    copy = ours[0].lm_head.adapters["default"].weight
    assert copy.data_ptr() != ours[0].lm_head.original.weight.data_ptr()


def test_experts_that_lie_stacked_are_split(tmp_path: Path) -> None:
    """As transformers has them, which it takes too, and not one by one as it writes them."""
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(MERGED).bfloat16()
    save(model, tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    shards.write(tmp_path, "model", dict(model.state_dict()))
    assert_same(streamed(tmp_path)[0], dense(tmp_path)[0])


def test_merged_experts_are_left_to_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(hf.MixtralForCausalLM(MERGED), tmp_path)
    said = r"folder: read as a whole, 0\.0 GB and more of memory: transformers merges or splits"
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=said.replace("folder", re.escape(str(folder)))):
        model, report = load_quantized(folder, config(), precision="float32")
    assert len(report.quantized) == 8 + 2 * 2 * MERGED.num_local_experts
    assert_same(model, dense(folder)[0])


def test_a_model_that_transformers_keeps_in_part_in_fp32_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(build("llama").bfloat16(), tmp_path)
    monkeypatch.setattr(
        hf.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["norm"], raising=False
    )
    with pytest.raises(NotStreamable, match="keeps a part of this model in float32"):
        streamed(folder)


def test_weights_under_another_name_are_left_to_transformers(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, "1GB")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(NotStreamable, match=r"neither model\.safetensors nor an index"):
        streamed(folder)


def test_of_two_equal_tied_weights_one_is_dropped(tmp_path: Path) -> None:
    folder = save(build("llama, tied"), tmp_path, "1GB")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    ours, theirs = streamed(folder), dense(folder)
    assert ours[1] == theirs[1]
    assert ours[0].lm_head.weight is ours[0].model.embed_tokens.weight
    assert_same(ours[0], theirs[0])


def test_two_different_tied_weights_are_left_to_transformers(tmp_path: Path) -> None:
    """It unties them."""
    folder = save(build("llama, tied"), tmp_path, "1GB")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    reason = r"lm_head.weight and model.embed_tokens.weight are tied by config.json and differ"
    with pytest.warns(UserWarning, match=reason):
        model = load_quantized(folder, config())[0]
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_weight_may_go_by_either_name(tmp_path: Path) -> None:
    """transformers draws a value for the other name, and drops it: the adapters then differ."""
    folder = save(build("llama, tied"), tmp_path, "1GB")
    rewrite(
        folder,
        lambda t: {key.replace("model.embed_tokens", "lm_head"): v for key, v in t.items()},
    )
    ours = streamed(folder)
    assert ours[0].lm_head.weight is ours[0].model.embed_tokens.weight
    both = (ours[0], dense(folder)[0])
    assert_same(*map(tiny.randomize_adapter, both))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path, "1GB")
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda t: t | {key: t[key] * torch.nan})
    message = f"model.safetensors: {key}: weight must be finite; got 6144 NaN"
    with pytest.raises(ValueError, match=message):
        load_quantized(folder, config())


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path)
    with pytest.raises(ValueError, match="nowhere: the adapter does not fit"):
        load_quantized(folder, config(target_modules=("query",)), tmp_path / "nowhere")


def test_one_file_is_open_at_a_time_and_none_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept has memory of its own: the files can change under the model."""
    folder = save(build("llama"), tmp_path)
    opened, mapped, left = [], [], []
    put, read = loading.put, shards.Shards._open

    def spy_open(self: shards.Shards, path: Path) -> None:
        self.close()
        left.append(maps(folder))
        read(self, path)
        opened.append(path.name)

    def spy_put(*arguments: Any) -> None:
        mapped.append(maps(folder))
        put(*arguments)

    monkeypatch.setattr(shards.Shards, "_open", spy_open)
    monkeypatch.setattr(loading, "put", spy_put)
    ours = streamed(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert opened == files + files, "for the headers, and for the data"
    assert max(map(len, mapped)) <= 1
    assert not any(left), "a map is dropped before the next file is opened"
    assert not maps(folder)

    expected = copy.deepcopy(dense(folder)[0])
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    assert_same(ours[0], expected)


def maps(folder: Path) -> set[str]:
    """The folder's files that this process has mapped, where the system says so."""
    table = Path("/proc/self/maps")
    lines = table.read_text().splitlines() if table.exists() else []
    return {line.split()[-1] for line in lines if str(folder) in line}


def test_the_skeleton_has_no_values_but_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = hf.models.llama.modeling_llama.LlamaRMSNorm
    init = norm.__init__

    def draw(self: nn.Module, *arguments: Any, **settings: Any) -> None:
        init(self, *arguments, **settings)
        self.weight = nn.Parameter(torch.rand(64))

    monkeypatch.setattr(norm, "__init__", draw)
    state = torch.get_rng_state()
    model = loading.skeleton(hf.LlamaConfig(**GROUPED, dtype="bfloat16"))
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    table = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq, table)
    assert not next(build("llama").parameters()).is_meta, "the next model has values"


@pytest.mark.gpu
def test_a_gpu_holds_the_quantized_model_and_one_tensor(tmp_path: Path) -> None:
    """Which is the one that the CPU makes, adapters included."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=8192, num_hidden_layers=8, **sizes))
    folder = save(model, tmp_path, "20MB")
    convert = partial(quantize_model, config=config())
    loading.load_and_quantize(
        folder, convert, torch.device("cuda"), torch.bfloat16
    )  # compiles the kernels
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(5)
        loaded = loading.load_and_quantize(folder, convert, torch.device(device), torch.bfloat16)
        made.append(loaded[0])
    held = torch.cuda.memory_allocated() - before
    largest = 8192 * 512 * 4  # the embeddings, in fp32
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * largest
    ours, theirs = map(all_tensors, made)
    for name, tensor in ours.items():
        if "absmax" not in name and "nested" not in name:  # means are summed in another order
            assert torch.equal(tensor.cpu(), theirs[name]), name
    for one, other in zip(made[0].modules(), made[1].modules(), strict=True):
        if isinstance(one, QLoRALinear):
            assert one.packed.is_cuda
            torch.testing.assert_close(
                one.base_weight().cpu(), other.base_weight(), rtol=0.05, atol=0
            )
