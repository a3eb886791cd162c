"""Adapters merged into the base: dense layers, or again 4-bit ones, that answer as the adapted ones did."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import qlora
from qlora import QLoRAConfig
from qlora.__main__ import main
from qlora.adapter import Start
from qlora.adapter_files import read_config
from qlora.lora_layer import LoRALayer
from qlora.merging import Requantized, merge, requantize
from qlora.pretrained import load_quantized, quantize_folder
from tests import tiny
from tests.test_experts import gpt_oss

IDS = tiny.tokens()


def layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def added(layer: LoRALayer) -> Tensor:
    with torch.no_grad():
        return layer.scaling * (layer.lora_b @ layer.lora_a)


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)
    ).eval()


# --- Onto the dequantized base ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("format", ["nf4", None])
@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_model_answers_as_the_adapted_one(
    make: Callable[[], nn.Module], format: str | None, dora: bool
) -> None:
    model = tiny.adapted(make, format=format, dora=dora)
    expected = tiny.logits(model, IDS)
    assert merge(model) is model
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    assert kinds == ({Conv1D, nn.Linear} if make is tiny.gpt2 else {nn.Linear})
    assert not any(isinstance(m, qlora.LoRALinear | qlora.QLoRALinear) for m in model.modules())
    torch.testing.assert_close(tiny.logits(model, IDS), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_merging_adds_in_fp32_and_rounds_once() -> None:
    model = tiny.adapted()
    layer = model.model.layers[0].mlp.gate_proj
    expected = qlora.dequantize_4bit(layer.weight, torch.float32) + added(layer)
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
    config = QLoRAConfig(rank=2)
    layer = qlora.QLoRALinear.from_linear(nn.Linear(64, 8), config)
    x = torch.randn(3, 64)
    torch.testing.assert_close(merge(layer)(x), layer(x))
    with pytest.raises(ValueError, match="model must hold QLoRA layers to merge"):
        merge(tiny.llama())


def test_the_adapters_in_use_are_merged_by_their_weights() -> None:
    model = tiny.adapted()
    qlora.add_adapter(model, QLoRAConfig(rank=2, target_modules=["q_proj"]), "other")
    tiny.randomize_adapter(model, seed=7)
    qlora.set_adapter(model, {"default": 0.5, "other": -2.0})
    expected = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(merge(copy.deepcopy(model)), IDS), expected)
    qlora.set_adapter(model, None)
    alone = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(merge(model), IDS), alone)


# --- Onto the original weights ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("as_folder", [False, True])
def test_merging_onto_the_original_weights_adds_to_these(
    tmp_path: Path, make: Callable[[], nn.Module], as_folder: bool
) -> None:
    original = make().to(torch.bfloat16)
    model = (
        tiny.adapted(lambda: copy.deepcopy(original), target_modules=["mlp.c_fc", "c_proj"])
        if make is tiny.gpt2
        else tiny.adapted(lambda: copy.deepcopy(original))
    )
    adapted = layers(model)
    expected = {}
    for name, layer in adapted.items():
        weight = original.get_submodule(name).weight.float()
        weight = weight.mT if layer.fan_in_fan_out else weight
        expected[name] = weight if layer.lora_a is None else weight + added(layer)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    onto = tiny.model_folder(tmp_path, original) if as_folder else original
    merge(model, torch.float32, onto=onto)
    for name, weight in expected.items():
        merged = model.get_submodule(name).weight
        assert torch.equal(merged.mT if adapted[name].fan_in_fan_out else merged, weight)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["nf4", None])
def test_an_untrained_adapter_onto_the_original_gives_the_original(
    dora: bool, format: str | None
) -> None:
    original = tiny.llama()
    model = tiny.quantized(copy.deepcopy(original), dora=dora, format=format)
    merge(model, onto=original)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=1e-6)


def test_dora_scales_rows_of_the_original_as_it_scales_the_bases() -> None:
    original = tiny.llama()
    model = tiny.adapted(lambda: copy.deepcopy(original), dora=True)
    name, layer = next(iter(layers(model).items()))
    magnitude = layer.adapters["default"].magnitude
    magnitude.data *= torch.linspace(0.5, 2, len(magnitude))
    lengths = (layer.base_weight() + added(layer)).norm(dim=1)
    weight = original.get_submodule(name).weight + added(layer)
    expected = (magnitude / lengths)[:, None] * weight
    merge(model, onto=original)
    torch.testing.assert_close(model.get_submodule(name).weight, expected)


def _other_weights() -> nn.Module:
    return tiny.llama(seed=9)


def _other_at_the_end() -> nn.Module:
    model = tiny.llama()
    nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    return model


def _smaller() -> nn.Module:
    return tiny.llama(intermediate_size=64)


def _shorter() -> nn.Module:
    return tiny.llama(num_hidden_layers=1)


@pytest.mark.parametrize(
    ("onto", "settings", "message"),
    [
        (_other_weights, {}, "q_proj has other weights than that"),
        (_other_at_the_end, {}, "1.mlp.down_proj has other weights than that$"),
        (_smaller, {}, r"gate_proj must have shape \(96, 64\), and has \(64, 64\)"),
        (_shorter, {}, r"it has no linear layer model.layers.1.self_attn.q_proj"),
        (tiny.adapted, {}, "onto must be a dense model without adapters"),
        (tiny.llama, {"init": "pissa"}, "onto must be None after init='pissa'"),
        (tiny.llama, {"init": "loftq"}, "onto must be None after init='loftq'"),
    ],
)
def test_what_does_not_fit_the_original_is_refused(
    onto: Callable[[], nn.Module], settings: dict[str, Any], message: str
) -> None:
    model = tiny.adapted(**settings)
    expected = tiny.logits(model, IDS)
    with pytest.raises(ValueError, match=message):
        merge(model, onto=onto())
    assert torch.equal(tiny.logits(model, IDS), expected)


def test_a_folder_that_is_not_the_original_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/config\.json"):
        merge(tiny.adapted(), onto=tmp_path / "none")
    folder = tiny.model_folder(tmp_path / "dense")
    quantize_folder(folder, tmp_path / "nf4", QLoRAConfig())
    with pytest.raises(ValueError, match="a dense model is needed"):
        merge(tiny.adapted(), onto=tmp_path / "nf4")
    for make, message in (
        (_other_weights, "q_proj has other weights than that$"),
        (
            _other_at_the_end,
            r"down_proj has .* than that \(the model is partly merged by now: load",
        ),
    ):
        folder = tiny.model_folder(tmp_path / make.__name__, make())
        with pytest.raises(ValueError, match=message):
            merge(tiny.adapted(), onto=folder)


# --- Trained whole, and tied ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_whole_take_their_place(tmp_path: Path, tied: bool) -> None:
    model = tiny.llama(tie_word_embeddings=tied)
    tiny.quantized(model, modules_to_save=["lm_head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    expected = tiny.logits(model, IDS)
    embedding = model.get_input_embeddings().weight.clone()
    merge(model)
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(tiny.logits(model, IDS), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, IDS), tiny.logits(model, IDS))
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)


def test_adapters_that_are_switched_off_are_merged_all_the_same() -> None:
    model = tiny.adapted(modules_to_save=["lm_head"])
    model.lm_head.adapters["default"].weight.data *= 2
    expected = tiny.logits(model, IDS)
    qlora.enable_adapters(model, False)
    torch.testing.assert_close(tiny.logits(merge(model), IDS), expected)


def test_an_adapted_head_is_untied_from_the_embedding(tmp_path: Path) -> None:
    model = tiny.adapted(
        lambda: tiny.llama(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"]
    )
    expected = tiny.logits(model, IDS)
    merge(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(tiny.logits(loaded, IDS), expected)


def test_what_is_tied_and_not_trained_stays_tied(tmp_path: Path) -> None:
    model = tiny.adapted(lambda: tiny.llama(tie_word_embeddings=True))
    merge(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- Quantized anew ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_requantized_model_is_its_merged_weights_quantized(
    make: Callable[[], nn.Module], double_quant: bool
) -> None:
    settings = {"format": "fp4", "blocksize": 32, "double_quant": double_quant}
    model = tiny.adapted(make, **settings)
    merged = merge(copy.deepcopy(model), torch.float32)
    bases = {name: layer.base_weight() for name, layer in layers(model).items()}
    done = {item.name: item for item in requantize(model)}
    assert done.keys() == bases.keys()
    for name, layer in layers(model).items():
        exact = merged.get_submodule(name).weight
        exact = exact.mT if layer.fan_in_fan_out else exact
        expected = qlora.quantize_4bit(exact, **settings)
        assert torch.equal(layer.weight.packed, expected.packed)
        assert torch.equal(layer.weight.absmax, expected.absmax)
        size = exact.norm()
        error = (qlora.dequantize_4bit(expected) - exact).norm() / size
        assert done[name].error == pytest.approx(error.item(), rel=1e-4)
        adapter = (exact - bases[name]).norm() / size
        assert done[name].adapter == pytest.approx(adapter.item(), rel=1e-4)
        assert 0.02 < done[name].error < 0.3
        moved = layer.base_weight() - bases[name]
        kept = (moved * (exact - bases[name])).sum() / (exact - bases[name]).square().sum()
        assert done[name].kept == pytest.approx(kept.item(), rel=1e-3, abs=1e-4)
        assert not layer.adapters
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_requantizing_keeps_the_dtype_and_needs_4_bits() -> None:
    model = tiny.adapted(lambda: tiny.llama().to(torch.bfloat16))
    requantize(model)
    assert {layer.base_dtype for layer in layers(model).values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="model must hold 4-bit layers with an adapter in use"):
        requantize(tiny.adapted(format=None))


def test_layers_without_an_adapter_in_use_are_not_quantized_again() -> None:
    model = tiny.adapted(target_modules=["q_proj"])
    before = {name: layer.weight for name, layer in layers(model).items()}
    names = {item.name for item in requantize(model)}
    assert names == {name for name in before if name.endswith("q_proj")}
    for name in before.keys() - names:
        after = model.get_submodule(name).weight
        assert torch.equal(after.packed, before[name].packed)
        assert torch.equal(after.absmax, before[name].absmax)


def test_the_sum_with_the_original_can_be_quantized() -> None:
    original = tiny.llama()
    model = tiny.adapted(lambda: copy.deepcopy(original))
    merged = merge(copy.deepcopy(model), torch.float32, onto=original)
    requantize(model, torch.bfloat16, onto=original)
    for name, layer in layers(model).items():
        expected = qlora.quantize_4bit(merged.get_submodule(name).weight)
        assert torch.equal(layer.weight.packed, expected.packed)
        assert layer.base_dtype == torch.bfloat16


def test_a_small_adapter_survives_4_bits_over_the_original_weights_alone() -> None:
    original = tiny.llama()
    model = tiny.adapted(lambda: copy.deepcopy(original))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data *= 0.02
    with pytest.warns(UserWarning, match="4 bits keep [0-9]% of what the adapter had added"):
        rounded_away = requantize(copy.deepcopy(model))
    survived = requantize(model, onto=original)

    def kept(done: list[Requantized]) -> float:
        return sum(item.kept for item in done) / len(done)

    assert kept(rounded_away) < 0.2
    assert kept(survived) == pytest.approx(1, abs=0.3)


def test_zeros_requantize_without_an_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(model[0].weight)
    tiny.quantized(model)
    with pytest.warns(UserWarning, match="4 bits keep 0%"):
        (item,) = requantize(model)
    assert (item.error, item.adapter, item.kept) == (0, 0, 0)


def test_what_is_left_after_requantizing_was_made_for_no_adapter() -> None:
    model = tiny.adapted(init="pissa")
    requantize(model)
    assert {layer.start for layer in layers(model).values()} == {Start()}


def test_adapted_experts_that_are_dense_are_stacked_again_beside_4_bits() -> None:
    original = mixtral()
    kind = type(original.model.layers[0].mlp.experts)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    qlora.quantize_model(original, QLoRAConfig(rank=4), attention)
    model = tiny.randomize_adapter(original)
    merged = merge(copy.deepcopy(model))
    requantize(model)
    assert layers(model).keys() == set(attention)
    found, expected = (each.model.layers[0].mlp.experts for each in (model, merged))
    assert type(found) is kind
    assert torch.equal(found.down_proj, expected.down_proj)
    assert torch.equal(found.gate_up_proj, expected.gate_up_proj)


def test_a_model_without_input_embeddings_is_merged() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    convolutions = {"conv_dim": (32,), "conv_stride": (2,), "conv_kernel": (3,)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(**sizes, **convolutions, **positions, num_attention_heads=2)
    )
    merge(tiny.quantized(model))
    assert not layers(model)


def test_experts_that_lie_stacked_are_read_one_by_one(tmp_path: Path) -> None:
    """Turned and with biases, as gpt-oss has them; in its own names, so that nothing is read as a whole."""
    original = gpt_oss()
    folder = tiny.model_folder(tmp_path, original)
    model = tiny.adapted(lambda: copy.deepcopy(original))
    by_model = merge(copy.deepcopy(model), onto=original)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(model, onto=folder)
    for name, value in by_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_experts_are_merged_into_their_stacks_again(tmp_path: Path) -> None:
    original = mixtral()
    folder = tiny.model_folder(tmp_path, original)
    kind = type(original.model.layers[0].mlp.experts)
    model = tiny.adapted(lambda: copy.deepcopy(original))
    expected = tiny.logits(model, IDS)
    merged = merge(copy.deepcopy(model))
    assert type(merged.model.layers[0].mlp.experts) is kind
    torch.testing.assert_close(tiny.logits(merged, IDS), expected)
    with pytest.warns(UserWarning, match="read as a whole"):
        by_folder = merge(copy.deepcopy(model), onto=folder)
    layer = model.model.layers[0].mlp.experts.down_proj[1]
    stack = original.model.layers[0].mlp.experts.down_proj
    merge(model, onto=original)
    for onto in (model, by_folder):
        found = onto.model.layers[0].mlp.experts.down_proj[1]
        assert torch.equal(found, stack[1] + added(layer))


# --- On the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in bfloat16, and an adapter for it."""
    folder = tmp_path_factory.mktemp("merge")
    model = tiny.llama().to(torch.bfloat16)
    tiny.model_folder(folder / "model", model)
    qlora.save_adapter(tiny.adapted(lambda: model), folder / "adapter")
    return folder


def command(place: Path, out: Path, *options: str, model: str = "model") -> int:
    return main(["merge", str(place / model), str(place / "adapter"), str(out), *options])


def loaded(place: Path) -> nn.Module:
    adapter = place / "adapter"
    return load_quantized(place / "model", read_config(adapter), adapter, precision="float32")[0]


def test_the_command_merges_onto_the_original(place: Path, tmp_path: Path) -> None:
    assert command(place, tmp_path / "out", "--onto-original") == 0
    expected = merge(loaded(place), torch.bfloat16, onto=place / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    for name, value in expected.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_a_head_that_is_tied_no_longer_is_written_beside_4_bits(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = tiny.model_folder(tmp_path / "model", tiny.llama(tie_word_embeddings=True))
    config = QLoRAConfig(rank=4, **settings)
    model = tiny.randomize_adapter(load_quantized(folder, config, precision="float32")[0])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01)
    qlora.save_adapter(model, tmp_path / "adapter")
    assert command(tmp_path, tmp_path / "out", "--requantize", "--dtype", "float32") == 0
    requantize(model)
    plain = QLoRAConfig(rank=1, target_modules=None)
    found, _ = load_quantized(tmp_path / "out", plain, precision="float32")
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    assert torch.equal(tiny.logits(found, IDS), tiny.logits(model, IDS))


@pytest.mark.parametrize("options", [(), ("--onto-original",)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_command_writes_4_bits_and_says_what_they_cost(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    dtype: str,
) -> None:
    assert command(place, tmp_path / "out", "--requantize", "--dtype", dtype, *options) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"error of the weights in 4 bits: \d\.\d\d% on average, \d+\.\d\d% at worst \(model\.layers\.\d\..*\); "
        r"the adapter had changed them by \d+\.\d\d%, of which \d+% is kept",
        said,
    )
    expected = loaded(place)
    requantize(expected, getattr(torch, dtype), onto=place / "model" if options else None)
    settings = QLoRAConfig(rank=1, target_modules=None)
    found, _ = load_quantized(tmp_path / "out", settings, precision=dtype)
    for name, layer in layers(found).items():
        own = expected.get_submodule(name)
        assert torch.equal(layer.weight.packed, own.weight.packed)
        assert layer.base_dtype == getattr(torch, dtype)
    assert found.model.norm.weight.dtype == getattr(torch, dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["dtype"] == dtype


def test_the_command_needs_the_original(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_folder(place / "model", place / "nf4", QLoRAConfig())
    assert command(place, tmp_path / "out", "--onto-original", model="nf4") == 2
    assert "a dense model is needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command(place, tmp_path / "out", "--requantize", model="nf4") == 0
