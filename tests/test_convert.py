"""`quantize_model` on the model classes that people use, and on the odd ways in which modules are shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora import LoRALinear, QLoRAConfig, QLoRALinear, QuantizationReport, quantize_model
from tests.architectures import GENERATIVE, MODELS, bert_mlm, inputs, tiny


def config(**settings: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"rank": 2, "alpha": 4, "blocksize": 32} | settings)


def randomized(model: nn.Module) -> nn.Module:
    """Adapters that do something: a new one's B is zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter_gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs(name)).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def dense_twin(model: nn.Module, original: nn.Module, report: QuantizationReport) -> nn.Module:
    """The original model with each quantized weight replaced by the values that its 4 bits stand for."""
    twin = copy.deepcopy(original)
    for name in report.quantized:
        layer, linear = model.get_submodule(name), twin.get_submodule(name)
        weight = layer.base_weight()
        linear.weight.data = weight.mT.contiguous() if layer.fan_in_fan_out else weight
    return twin


# --- Every class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_are_converted_and_nothing_else(name: str) -> None:
    model = tiny(name)
    before = {key: (p, p.clone()) for key, p in model.named_parameters(remove_duplicate=False)}
    kinds = {key: type(module) for key, module in model.named_modules()}
    report = quantize_model(model, config())
    assert len(report.quantized) == len(report.adapted) == MODELS[name][1]
    head = model.get_output_embeddings()
    assert [model.get_submodule(key) for key in report.left_alone] == ([head] if head else [])
    assert (head is None) == (name == "bert_classifier")
    for key in report.quantized:
        assert type(model.get_submodule(key)) is QLoRALinear
        assert kinds.pop(key).__name__ in ("Linear", "Conv1D")
    assert kinds == {
        key: type(module)
        for key, module in model.named_modules()
        if key not in report.quantized and ".adapters" not in key
    }
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key.rpartition(".")[0] not in report.quantized and ".adapters." not in key:
            old, values = before[key]
            assert parameter is old  # the same object: what was tied is tied
            assert torch.equal(parameter, values)


@pytest.mark.parametrize("name", MODELS)
def test_output_is_that_of_the_dequantized_model(name: str) -> None:
    model = tiny(name)
    original = copy.deepcopy(model)
    report = quantize_model(model, config())
    twin = dense_twin(model, original, report)
    with torch.no_grad():
        result, expected, exact = (m(**inputs(name)) for m in (model, twin, original))
    torch.testing.assert_close(result.logits, expected.logits)
    torch.testing.assert_close(result.loss, expected.loss)
    assert not torch.allclose(result.logits, exact.logits)


def factors(layers: Iterable[str]) -> set[str]:
    """The names of the parameters of the layers' adapters."""
    return {
        f"{layer}.adapters.default.{which}" for layer in layers for which in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("name", MODELS)
def test_gradients_go_to_all_adapters_and_to_nothing_else(name: str) -> None:
    model = tiny(name).train()
    report = quantize_model(model, config())
    gradients = adapter_gradients(randomized(model), name)
    wanted = factors(report.adapted)
    assert gradients.keys() == wanted
    for key, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), key
        assert gradient.any(), key
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == wanted


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in MODELS), ("llama", True), ("t5", True)]
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = tiny(name).train()
    quantize_model(model, config(dropout=0.25))
    randomized(model)
    if reentrant:
        model.enable_input_require_grads()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        results.append(adapter_gradients(model, name))
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key])


@pytest.mark.parametrize("name", GENERATIVE)
def test_generates_with_a_cache(name: str) -> None:
    model = tiny(name)
    quantize_model(model, config())
    given = inputs(name)
    del given["labels"]
    lengths = {"max_new_tokens": 5, "min_new_tokens": 5}
    cached = randomized(model).generate(**given, **lengths, do_sample=False, use_cache=True)
    recomputed = model.generate(**given, **lengths, do_sample=False, use_cache=False)
    assert torch.equal(cached, recomputed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "whisper"])
def test_in_16_bits(name: str) -> None:
    """Converted, then cast: scales stay in fp32, and the logits are near those of fp32."""
    model = tiny(name)
    quantize_model(model, config())
    given = inputs(name)
    with torch.no_grad():
        expected = randomized(model)(**given).logits
        model.to(torch.bfloat16)
        given = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in given.items()}
        logits = model(**given).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_t5_with_its_fp32_layers() -> None:
    """transformers keeps T5's `wo` in fp32 and casts its input to `wo.weight.dtype`."""
    model = tiny("t5").to(torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    for settings in ({}, {"format": None}):
        converted = copy.deepcopy(model)
        quantize_model(converted, config(**settings))
        assert torch.isfinite(converted(**inputs("t5")).loss)


def test_saving_and_loading_a_whole_model() -> None:
    first, second = tiny("bert_mlm"), bert_mlm().eval()
    for model in (first, second):
        quantize_model(model, config())
    second.load_state_dict(randomized(first).state_dict(), strict=True)
    with torch.no_grad():
        logits = [model(**inputs("bert_mlm")).logits for model in (first, second)]
    assert torch.equal(*logits)


# --- The sizes of the paper -------------------------------------------------------------------------

LLAMA = {
    "7B": (4096, 32, 32, 11008, 3_865_592_704, 159_907_840),
    "13B": (5120, 40, 40, 13824, 7_201_419_360, 250_347_520),
    "33B": (6656, 60, 52, 17920, 17_414_091_152, 487_587_840),
    "65B": (8192, 80, 64, 22016, 34_458_929_344, 799_539_200),
}


@pytest.mark.parametrize("size", LLAMA)
def test_llama_takes_the_bytes_of_the_formula(size: str) -> None:
    """On the meta device: NF4, double quantization, 16-bit embeddings and norms, fp32 offsets."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, layers, heads, ffn, expected_bytes, adapter_parameters = LLAMA[size]
    settings = LlamaConfig(
        hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(settings).to(torch.bfloat16)
    report = quantize_model(model)
    parameters = layers * (4 * d * d + 3 * d * ffn)
    dense_bytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert dense_bytes == 2 * (2 * 32000 * d + (2 * layers + 1) * d)
    assert report.quantized_parameters == parameters
    assert report.quantized_bytes + dense_bytes == expected_bytes
    assert report.trainable_parameters == adapter_parameters
    assert f"{report.bits_per_parameter:.3f}" == "4.127"
    assert len(report.quantized) == 7 * layers
    rotary_bytes = sum(buffer.nbytes for buffer in model.model.rotary_emb.buffers())
    assert report.bytes_after == expected_bytes + rotary_bytes + 4 * adapter_parameters
    assert report.bytes_before == dense_bytes + rotary_bytes + 2 * parameters


# --- Which layers get an adapter --------------------------------------------------------------------

Q_AND_V = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], Q_AND_V),
        (("self_attn.q_proj", "self_attn.v_proj"), Q_AND_V),
        (r".*\.(q|v)_proj", Q_AND_V),
        (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
        (r"model\.layers\.0\.mlp\.up_proj", {"model.layers.0.mlp.up_proj"}),
    ],
)
def test_target_modules(target_modules: Any, expected: set[str]) -> None:
    """The others are quantized all the same, without an adapter."""
    model = tiny("llama")
    report = quantize_model(model, config(target_modules=target_modules))
    assert set(report.adapted) == expected
    assert len(report.quantized) == 14
    for name in report.quantized:
        assert (model.get_submodule(name).lora_a is not None) == (name in expected)
    assert adapter_gradients(randomized(model), "llama").keys() == factors(expected)


@pytest.mark.parametrize(
    "target_modules",
    [["proj"], ["q"], ["q_proj", "v_porj"], "q_proj", r"q_proj.*", ["embed_tokens"], ["norm"]],
)
def test_target_modules_that_match_nothing(target_modules: Any) -> None:
    """Names match whole parts, a regular expression the full name; embeddings are never targets."""
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"target_modules must match .* q_proj, k_proj, v_proj"):
        quantize_model(model, config(target_modules=target_modules))
    assert not any(isinstance(module, QLoRALinear) for module in model.modules())


def test_an_output_embedding_that_is_named_gets_an_adapter_and_stays_dense() -> None:
    for format in ("nf4", None):
        model = tiny("llama")
        head = model.lm_head.weight.clone()
        report = quantize_model(model, config(target_modules=["lm_head", "q_proj"], format=format))
        assert set(report.adapted) == {*(name for name in Q_AND_V if "q_proj" in name), "lm_head"}
        assert len(report.quantized) == (14 if format else 0)
        assert "lm_head" not in report.quantized + report.left_alone
        assert torch.equal(model.lm_head.weight, head)
        assert adapter_gradients(randomized(model), "llama").keys() == factors(report.adapted)


@pytest.mark.parametrize("format", ["nf4", None])
def test_no_adapter_yet(format: str | None) -> None:
    model = tiny("llama")
    report = quantize_model(model, config(target_modules=None, format=format))
    assert report.adapted == ()
    assert len(report.quantized) == (14 if format else 0)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_patterns_give_layers_ranks_and_alphas_of_their_own() -> None:
    model = tiny("llama")
    patterns = {"rank_pattern": {"v_proj": 2, r"1\.mlp\..*": 3}, "alpha_pattern": {"o_proj": 32}}
    quantize_model(model, config(rank=4, alpha=8, **patterns))
    for i in (0, 1):
        layer = model.model.layers[i]
        attention, mlp = layer.self_attn, layer.mlp
        assert (attention.q_proj.rank, attention.q_proj.scaling) == (4, 2.0)
        assert (attention.v_proj.rank, attention.v_proj.scaling) == (2, 4.0)
        assert (attention.o_proj.rank, attention.o_proj.scaling) == (4, 8.0)
        assert mlp.up_proj.rank == (3 if i else 4)


def test_modules_to_save_are_trained_whole() -> None:
    """Neither quantized nor adapted; a copy of theirs is trainable, the original stays."""
    model = tiny("llama")
    head, q_proj = model.lm_head, model.model.layers[1].self_attn.q_proj
    names = ["lm_head", "layers.1.self_attn.q_proj"]
    report = quantize_model(model, config(modules_to_save=names))
    assert len(report.quantized) == len(report.adapted) == 13
    assert model.lm_head.original is head
    assert model.model.layers[1].self_attn.q_proj.original is q_proj
    assert not head.weight.requires_grad
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    copies = {
        "lm_head.adapters.default.weight",
        "model.layers.1.self_attn.q_proj.adapters.default.weight",
    }
    assert trainable == factors(report.adapted) | copies
    assert adapter_gradients(randomized(model), "llama").keys() == trainable
    with pytest.raises(ValueError, match=r"modules_to_save must match a module; 'score'"):
        quantize_model(tiny("llama"), config(modules_to_save=["score"]))


def test_layers_to_hold_in_4_bits_can_be_named() -> None:
    """As a file says that holds some linear layers dense, and its output embedding in 4 bits."""
    layers = ["lm_head", "model.layers.0.mlp.up_proj"]
    model = tiny("llama")
    report = quantize_model(model, config(), layers)
    assert set(report.quantized) == set(layers)
    assert len(report.adapted) == 14
    assert "lm_head" not in report.adapted
    assert type(model.model.layers[1].mlp.up_proj) is LoRALinear
    with pytest.raises(ValueError, match=r"layers must name linear layers .* 'norm'"):
        quantize_model(tiny("llama"), config(), ["norm"])


def test_a_bad_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules must be .*'\*_proj' \(nothing to repeat"):
        quantize_model(tiny("llama"), config(target_modules="*_proj"))


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules must match .* \(no linear layers\)"):
        quantize_model(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), config())


def test_plain_lora_over_a_dense_base() -> None:
    """format=None: only the targets are touched, and a new adapter changes nothing at all."""
    model = tiny("gpt2")
    given = inputs("gpt2")
    with torch.no_grad():
        expected = model(**given).logits
        report = quantize_model(model, config(format=None, target_modules=["c_attn"]))
        assert torch.equal(model(**given).logits, expected)
    assert report.quantized == ()
    assert report.adapted == ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    kinds = [type(model.get_submodule(name)) for name in report.adapted]
    assert kinds == [LoRALinear, LoRALinear]
    assert report.bytes_after == report.bytes_before + 4 * report.trainable_parameters
    assert len(adapter_gradients(randomized(model), "gpt2")) == 4


# --- Shared, subclassed and nested ------------------------------------------------------------------


class Shared(nn.Module):
    """One layer in two places, two layers with one weight, one tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.first = nn.Linear(32, 32)
        self.again = self.first
        self.block = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.block[2].weight = self.block[0].weight
        self.out = nn.Linear(32, 16, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.first(self.embedding(ids)).tanh())
        return self.out(self.block(x))


def test_shared_layers_stay_shared() -> None:
    torch.manual_seed(0)
    model = Shared()
    original, ids = copy.deepcopy(model), torch.arange(16)
    report = quantize_model(model, config())
    assert report.quantized == ("first", "again", "block.0", "block.2")
    assert report.left_alone == ("out",)
    assert model.first is model.again
    assert model.out.weight is model.embedding.weight
    first, second = model.block[0], model.block[2]
    assert first.packed is second.packed
    assert first.lora_a is not second.lora_a
    assert not torch.equal(first.bias, second.bias)
    assert report.quantized_parameters == 2 * 32 * 32  # each weight counts once
    assert report.trainable_parameters == 3 * 2 * (32 + 32)
    twin = dense_twin(model, original, report)
    torch.testing.assert_close(model(ids), twin(ids))
    randomized(model)(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_subclasses_of_linear_are_left_alone_and_reported() -> None:
    """Attention reads `out_proj.weight` itself, past its forward."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "last": nn.Linear(32, 32)})
    out_proj = model["attention"].out_proj
    report = quantize_model(model, config())
    assert report.quantized == ("last",)
    assert report.left_alone == ("attention.out_proj",)
    assert model["attention"].out_proj is out_proj
    assert "attention.out_proj" in str(report)
    model["attention"](*[torch.randn(3, 2, 32)] * 3)


@pytest.mark.parametrize("format", ["nf4", None])
def test_torchs_encoder_takes_no_shortcut_in_inference(format: str | None) -> None:
    """Its fast path reads the linear layers' weights itself: it would miss the adapters."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2).eval()
    quantize_model(model, config(format=format))
    randomized(model)
    x, padding = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = model(x, src_key_padding_mask=padding)
    assert expected.requires_grad
    with torch.no_grad():
        result = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(result[~padding], expected[~padding])


class Wrapper(nn.Module):
    """A model inside another, as in a training framework."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama")


class Heads(nn.Module):
    """A model with several output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.heads = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16)])

    def get_output_embeddings(self) -> nn.ModuleList:
        return self.heads


def test_output_embeddings_are_found_inside() -> None:
    assert quantize_model(Wrapper(), config()).left_alone == ("inner.lm_head",)
    assert quantize_model(Heads(), config()).left_alone == ("heads.0", "heads.1")


def test_a_transposed_weight_is_not_taken_for_its_twin() -> None:
    """A Conv1D and a Linear that share a square parameter multiply with its transposes."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Conv1D(32, 32))
    model[1].weight = model[0].weight
    original, x = copy.deepcopy(model), torch.randn(4, 32)
    report = quantize_model(model, config())
    torch.testing.assert_close(model(x), _untied_twin(model, original, report)(x))


def _untied_twin(
    model: nn.Module, original: nn.Module, report: QuantizationReport
) -> Callable[[Tensor], Tensor]:
    first, second = (model.get_submodule(name).base_weight() for name in report.quantized)
    assert not torch.equal(first, second)
    return lambda x: F.linear(F.linear(x, first, original[0].bias), second, original[1].bias)


# --- State that is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training: bool) -> None:
    model = tiny("llama").train(training)
    quantize_model(model, config())
    assert all(module.training == training for module in model.modules())


def test_the_default_is_the_papers() -> None:
    model = nn.Sequential(nn.Linear(128, 128))
    report = quantize_model(model)
    layer = model[0]
    assert (layer.format, layer.blocksize, layer.scale_format) == ("nf4", 64, "dynamic8")
    assert (layer.rank, layer.scaling, layer.dropout) == (64, 0.25, 0.0)
    assert report.trainable_parameters == 2 * 64 * 128


# --- Refused, with the model as it was --------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "error", "message"),
    [
        (
            float("nan"),
            torch.float32,
            ValueError,
            r"layers\.1\.mlp\.up_proj: weight must be finite",
        ),
        (float("inf"), torch.bfloat16, ValueError, r"layers\.1\.mlp\.up_proj: .* 1 NaN or inf"),
        (
            1.0,
            torch.float64,
            TypeError,
            r"layers\.1\.mlp\.up_proj: weight must .* got torch.float64",
        ),
    ],
)
def test_a_bad_weight_is_named_and_the_model_unchanged(
    value: float, dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    model = tiny("llama")
    bad = model.model.layers[1].mlp.up_proj.to(dtype)
    bad.weight.data[3, 4] = value
    modules = dict(model.named_modules())
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        quantize_model(model, config())
    assert dict(model.named_modules()) == modules
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("first", ["nf4", None])
@pytest.mark.parametrize("second", ["nf4", None])
def test_converting_twice_is_refused(first: str | None, second: str | None) -> None:
    model = tiny("llama")
    quantize_model(model, config(format=first))
    with pytest.raises(ValueError, match="model must not have been converted before"):
        quantize_model(model, config(format=second))


def test_a_bare_layer_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    for layer in (nn.Linear(32, 32), Conv1D(32, 32)):
        with pytest.raises(ValueError, match="model must contain its linear layers"):
            quantize_model(layer, config())


# --- The report -------------------------------------------------------------------------------------


def test_the_report() -> None:
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    model.get_output_embeddings = lambda: None
    report = quantize_model(model, config(blocksize=64, target_modules=["1"]))
    weights = 2 * 64 * 96
    quantized_bytes = weights // 2 + weights // 64 + 2 * (4 + 4)  # codes, scales, second level
    dense_bytes = 4 * (10 * 64 + 96)
    adapter = 2 * (64 + 96)
    assert report == QuantizationReport(
        quantized=("1", "2"),
        adapted=("1",),
        left_alone=(),
        quantized_parameters=weights,
        dense_parameters=10 * 64 + 96,
        other_dense=(),
        quantized_bytes=quantized_bytes,
        trainable_parameters=adapter,
        bytes_before=4 * weights + dense_bytes,
        bytes_after=quantized_bytes + dense_bytes + 4 * adapter,
    )
    lines = {line[:26].strip(): line[26:] for line in str(report).splitlines()}
    assert lines == {
        "quantized layers": "2",
        "quantized parameters": "12,288",
        "parameters left dense": "736",
        "bits per parameter": "4.135",
        "layers with an adapter": "1",
        "trainable parameters": "320",
        "linear layers left alone": "none",
        "bytes before": "52,096 (0.0 MiB)",
        "bytes after": "10,576 (0.0 MiB)",
    }


def test_the_report_names_what_takes_as_much_memory_as_before() -> None:
    """Llama 4's experts, which run in a way of their own; not what is small, nor embeddings and linear layers."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    kind = Llama4TextConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_hidden_layers=2,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        pad_token_id=0,
    )
    report = quantize_model(Llama4ForCausalLM(kind), config())
    gate_up, down = 2 * 4 * 2 * 96 * 64, 2 * 4 * 64 * 96
    layer = "model.layers.*.feed_forward"
    assert report.other_dense == (
        (f"{layer}.experts.gate_up_proj", gate_up),
        (f"{layer}.experts.down_proj", down),
    )
    total = report.quantized_parameters + report.dense_parameters
    row = f"not linear, left dense    {layer}.experts.gate_up_proj ({gate_up:,}, {gate_up / total:.0%})"
    assert row in str(report)
    mostly_linear = replace(report, quantized_parameters=40 * (gate_up + down))
    assert "not linear" not in str(mostly_linear)
    assert "adapter" not in str(replace(report, adapted=(), trainable_parameters=0))
