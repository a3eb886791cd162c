"""Experts that transformers stacks in 3-D parameters: quantized, adapted, trained, merged and stacked again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call
from transformers.integrations.moe import use_experts_implementation

import qlora
from qlora import QLoRAConfig
from qlora.__main__ import main
from qlora.experts import QLoRAExperts, expert_linears, is_experts, restore_experts
from qlora.lora_layer import LoRALayer
from qlora.memory import plan_memory, static_bytes
from qlora.pretrained import load_quantized
from qlora.recipe import TrainConfig
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import runs, tiny

Model = hf.PreTrainedModel
NAMES = ("gate_up_proj", "down_proj")
EXPERTS, HIDDEN, INNER = 5, 40, 27  # no multiple of a block
SIZES = {
    "vocab_size": 258,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "num_experts_per_tok": 2,
    "initializer_range": 0.15,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "pad_token_id": None,
}


def _model(kind: str, seed: int, **settings: Any) -> Model:
    torch.manual_seed(seed)
    config = getattr(hf, f"{kind}Config")(**{**SIZES, **settings})
    model = getattr(hf, f"{kind}ForCausalLM")(config).eval()
    model.config._experts_implementation = "eager"  # the faster ones take no odd sizes
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):  # zero at first
            nn.init.normal_(parameter, std=0.1)
    return model


def mixtral(seed: int = 0, **settings: Any) -> Model:
    return _model(
        "Mixtral", seed, **{"intermediate_size": INNER, "num_local_experts": EXPERTS, **settings}
    )


def qwen3(seed: int = 0, **settings: Any) -> Model:
    return _model(
        "Qwen3Moe", seed, **{"moe_intermediate_size": INNER, "num_experts": EXPERTS, **settings}
    )


def gpt_oss(seed: int = 0, **settings: Any) -> Model:
    """Weights the other way round, with biases; gate and up interleaved and clamped."""
    return _model(
        "GptOss", seed, **{"intermediate_size": INNER, "num_local_experts": EXPERTS, **settings}
    )


MAKES = (mixtral, qwen3, gpt_oss)
Make = Callable[..., Model]


def experts_of(model: nn.Module, layer: int = 0) -> Any:
    return model.model.layers[layer].mlp.experts


def layers_of(model: nn.Module) -> dict[str, LoRALayer]:
    """The experts' layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALayer) and ".experts." in n}


def routing(tokens: int, experts: int = EXPERTS, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Two experts and their weights for each token."""
    torch.manual_seed(seed)
    chosen = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)] or [torch.zeros(2)])
    return chosen[:tokens].long(), torch.rand(tokens, 2)


def adapted(make: Make, seed: int = 0, **settings: Any) -> Model:
    return tiny.adapted(lambda: make(seed), **settings)


class Oracle:
    """transformers' own loop in fp64, over W + s B A of the layers in place of its weights."""

    dtype = torch.float64

    def __init__(self, make: Make, layer: QLoRAExperts) -> None:
        self.module, self.layer = experts_of(make()).to(self.dtype), layer
        self.factors = {
            name: factor.detach().to(torch.promote_types(factor.dtype, self.dtype)).requires_grad_()
            for name, factor in layer.named_parameters()
            if "lora_" in name
        }

    def base(self, name: str) -> Tensor:
        return self.layer.get_submodule(name).base_weight().to(self.dtype)

    def adapter(self, name: str) -> list[Tensor]:
        return [self.factors[f"{name}.adapters.default.lora_{part}"] for part in "ab"]

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        held = dict(self.module.named_parameters())
        for name in NAMES:
            merged = []
            for layer in (f"{name}.{i}" for i in range(EXPERTS)):
                a, b = self.adapter(layer)
                merged.append(self.base(layer) + 2 * b @ a)
            stacked = torch.stack(merged)
            held[name] = stacked.mT if self.module.is_transposed else stacked
        return functional_call(self.module, held, (x, chosen, shares))


class Plain(Oracle):
    """LoRA in plain PyTorch, expert by expert, in the dtype of the layers."""

    def __init__(self, make: Make, layer: QLoRAExperts, dtype: torch.dtype) -> None:
        self.dtype = dtype
        super().__init__(make, layer)

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(EXPERTS):
            tokens, places = torch.where(chosen == i)
            z = self.module._apply_gate(self.linear(x[tokens], "gate_up_proj", i))
            z = self.linear(z, "down_proj", i) * shares[tokens, places, None]
            y = y.index_add(0, tokens, z)
        return y

    def linear(self, x: Tensor, name: str, i: int) -> Tensor:
        bias = getattr(self.module, f"{name}_bias", None)
        a, b = (factor.to(self.dtype) for factor in self.adapter(f"{name}.{i}"))
        y = F.linear(x, self.base(f"{name}.{i}"), None if bias is None else bias[i])
        return y + 2 * F.linear(F.linear(x, a), b)


GROUPS = [("x", ""), ("shares", ""), *((name, f"lora_{part}") for name in NAMES for part in "ab")]


# --- Values and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("format", ["nf4", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_transformers_loop(
    make: Make, format: str | None, dtype: torch.dtype
) -> None:
    layer = experts_of(adapted(make, format=format))
    if dtype != torch.float32:
        layer = layer.to(dtype)
        for parameter in layer.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    chosen, shares = routing(24)
    x, up = torch.randn(24, HIDDEN), torch.randn(24, HIDDEN).to(dtype)
    results = []
    for run in (layer, Plain(make, layer, dtype), Oracle(make, layer)):
        kind = getattr(run, "dtype", dtype)
        inputs = [value.to(dtype).to(kind).requires_grad_() for value in (x, shares)]
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        named = getattr(run, "factors", trained)
        y = run(inputs[0], chosen, inputs[1])
        grads = torch.autograd.grad(y, [*inputs, *named.values()], up.to(kind), allow_unused=True)
        results.append((y, dict(zip(["x", "shares", *named], grads, strict=True))))
    (y, grads), (plain, plain_grads), (oracle, exact) = results
    assert_close_to_oracle(y, plain, oracle, FORWARD_FACTOR)
    assert grads.keys() == exact.keys()
    assert len(grads) == 2 + 4 * EXPERTS
    for name, grad in exact.items():
        grads[name] = torch.zeros_like(plain_grads[name]) if grads[name] is None else grads[name]
        assert grads[name].any() == grad.any(), name
    for start, end in GROUPS:
        names = [name for name in grads if name.startswith(start) and name.endswith(end)]
        parts = ([given[n].flatten() for n in names] for given in (grads, plain_grads, exact))
        assert_close_to_oracle(*map(torch.cat, parts), GRADIENT_FACTOR)


@pytest.mark.parametrize("make", MAKES)
def test_the_whole_model_answers_as_one_of_the_dequantized_weights(make: Make) -> None:
    model, dense = adapted(make), make()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoRALayer):
            continue
        whole, _, number = name.rpartition(".")
        if ".experts." in name:
            stacked = dense.get_parameter(whole).data
            stacked[int(number)] = (
                layer.merged_weight().mT if make is gpt_oss else layer.merged_weight()
            )
        else:
            dense.get_submodule(name).weight.data = layer.merged_weight()
    ids = tiny.tokens()
    torch.testing.assert_close(tiny.logits(model, ids), tiny.logits(dense, ids))
    assert (tiny.logits(make(), ids) - tiny.logits(dense, ids)).abs().max() > 0.01
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.EOS}
    assert torch.equal(model.generate(ids, **options), dense.generate(ids, **options))


@given(
    tokens=st.integers(0, 12),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_routing(tokens: int, experts: int, top_k: int, seed: int) -> None:
    """An expert may be chosen twice by a token, or a number that is none's."""
    config = hf.MixtralConfig(hidden_size=8, intermediate_size=3, num_local_experts=experts)
    config._experts_implementation = "eager"
    dense = hf.models.mixtral.modeling_mixtral.MixtralExperts(config)
    torch.manual_seed(seed)
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    model = nn.ModuleDict({"experts": copy.deepcopy(dense)})
    qlora.quantize_model(model, QLoRAConfig(rank=2, format=None))
    x, shares = torch.randn(tokens, 8), torch.rand(tokens, top_k)
    chosen = torch.randint(0, experts + 1, (tokens, top_k))
    y = model["experts"](x, chosen, shares)
    nobody = chosen == experts
    expected = dense(x, chosen.masked_fill(nobody, 0), shares.masked_fill(nobody, 0.0))
    torch.testing.assert_close(y, expected)


def test_only_experts_that_were_chosen_run_and_learn() -> None:
    layer = experts_of(adapted(mixtral))
    for i in (0, 3):  # they would show
        layer.down_proj[i].nested_offset.fill_(torch.nan)
    chosen = torch.tensor([[1, 4], [4, 1], [2, 1]])
    y = layer(torch.randn(3, HIDDEN), chosen, torch.rand(3, 2))
    assert y.isfinite().all()
    y.sum().backward()
    learned = {n.split(".")[1] for n, p in layer.named_parameters() if p.grad is not None}
    assert learned == {"1", "2", "4"}


def test_no_tokens_at_all() -> None:
    layer = experts_of(adapted(qwen3))
    x = torch.randn(0, HIDDEN, requires_grad=True)
    y = layer(x, torch.zeros(0, 2, dtype=torch.long), torch.rand(0, 2))
    assert y.shape == (0, HIDDEN)


def test_compiled_it_runs_as_it_is_and_is_compiled_once_for_all_routings() -> None:
    layer = experts_of(adapted(mixtral))
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: layer(*given) + 1, backend=counter)
    for seed in range(4):
        chosen, shares = routing(6, seed=seed)
        x = torch.randn(6, HIDDEN)
        assert torch.equal(compiled(x, chosen, shares), layer(x, chosen, shares) + 1)
    assert counter.frame_count <= 1


# --- What is converted ------------------------------------------------------------------------------


def test_a_compiled_model_is_saved_as_the_model_itself(tmp_path: Path) -> None:
    model = adapted(mixtral)
    qlora.save_adapter(model, tmp_path / "plain")
    qlora.save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        plain, compiled = (tmp_path / kind / name for kind in ("plain", "compiled"))
        assert compiled.read_bytes() == plain.read_bytes()


def test_the_report_counts_experts_as_layers() -> None:
    model = mixtral()
    total = sum(p.numel() for p in model.parameters())
    report = qlora.quantize_model(model, QLoRAConfig(rank=4))
    layers = layers_of(model)
    assert len(layers) == 2 * 2 * EXPERTS
    assert "model.layers.1.mlp.experts.gate_up_proj.3" in layers
    assert layers.keys() < set(report.quantized) == set(report.adapted)
    in_4bit = sum(layer.weight.numel for layer in layers.values())
    assert in_4bit == 2 * EXPERTS * (2 * INNER * HIDDEN + HIDDEN * INNER)
    attention = 2 * (2 * 40 * HIDDEN + 2 * 20 * HIDDEN)
    assert report.quantized_parameters == in_4bit + attention
    assert report.quantized_parameters + report.dense_parameters == total
    trained = sum(p.numel() for layer in layers.values() for p in layer.adapters.parameters())
    assert trained == 4 * 2 * EXPERTS * (2 * INNER + HIDDEN + HIDDEN + INNER)
    assert not any("experts" in name for name, _ in report.other_dense)
    assert not any("proj" in name for name, p in model.named_parameters() if p.dim() == 3)


@pytest.mark.parametrize(
    ("target_modules", "ends"),
    [
        (["gate_up_proj"], [f"gate_up_proj.{i}" for i in range(EXPERTS)]),
        (["mlp.experts.down_proj"], [f"down_proj.{i}" for i in range(EXPERTS)]),
        (["experts.gate_up_proj.3"], ["gate_up_proj.3"]),
        (r".*layers\.0.*\.down_proj\.[02]", ["down_proj.0", "down_proj.2"]),
        ("all-linear", [f"{name}.{i}" for name in NAMES for i in range(EXPERTS)]),
    ],
)
@pytest.mark.parametrize("format", ["nf4", None])
def test_target_modules(target_modules: Any, ends: list[str], format: str | None) -> None:
    model = mixtral()
    config = QLoRAConfig(rank=2, format=format, target_modules=target_modules)
    report = qlora.quantize_model(model, config)
    layers = layers_of(model)
    found = {name.split("experts.")[1] for name in report.adapted if "experts" in name}
    assert found == set(ends)
    assert all(bool(layer.adapters) == (name in report.adapted) for name, layer in layers.items())
    torch.testing.assert_close(
        tiny.logits(model, tiny.tokens()),
        tiny.logits(qlora.merge(copy.deepcopy(model)), tiny.tokens()),
    )


def test_experts_that_were_left_as_they_are_get_no_adapter_later() -> None:
    model = mixtral()
    config = QLoRAConfig(rank=2, format=None, target_modules=["q_proj"])
    qlora.quantize_model(model, config)
    with pytest.raises(ValueError, match="only quantize_model splits them"):
        qlora.add_adapter(model, QLoRAConfig(rank=2), "b")
    assert qlora.adapter_names(model) == ("default",)
    qlora.add_adapter(model, config, "b")


def test_patterns_are_for_all_experts_of_a_list() -> None:
    model = mixtral()
    patterns = {"rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {"down_proj": 5.0}}
    qlora.quantize_model(model, QLoRAConfig(rank=2, alpha=4, **patterns))
    for layer in experts_of(model).gate_up_proj:
        assert (layer.rank, layer.scaling) == (3, 4 / 3)
    for layer in experts_of(model).down_proj:
        assert (layer.rank, layer.scaling) == (2, 2.5)


def test_rows_may_be_repeated_by_gradient_checkpointing() -> None:
    """In which experts go from one adapter to the next; outside of the block it would be others."""
    model = adapted(mixtral)
    qlora.add_adapter(model, QLoRAConfig(rank=2), "b")
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    ids = tiny.tokens()
    with qlora.use_adapter(model, ["default", "b"]):
        model(ids, labels=ids).loss.backward()
        loss = model(ids, labels=ids).loss
    with pytest.raises(RuntimeError, match="gradient checkpointing repeats a forward pass"):
        loss.backward()


def test_a_dense_base_stays_where_it_is() -> None:
    """Views of the stacked parameter: no second copy of the experts."""
    model = qwen3()
    before = {name: p.untyped_storage().data_ptr() for name, p in model.named_parameters()}
    qlora.quantize_model(model, QLoRAConfig(rank=2, format=None, target_modules=["down_proj.1"]))
    for name, layer in layers_of(model).items():
        if name.startswith("model.layers.0") or layer.adapters:
            whole = name.rpartition(".")[0]
            assert layer.weight.untyped_storage().data_ptr() == before[whole]


def test_nothing_is_touched_where_no_expert_is_chosen() -> None:
    model = qwen3()
    qlora.quantize_model(model, QLoRAConfig(rank=2, format=None, target_modules=["q_proj"]))
    assert is_experts(experts_of(model))


def test_experts_in_a_module_that_is_trained_whole_stay_as_they_are() -> None:
    model = qwen3()
    report = qlora.quantize_model(model, QLoRAConfig(rank=2, modules_to_save=["layers.1.mlp"]))
    assert {name.split(".")[2] for name in report.quantized if "experts" in name} == {"0"}
    assert is_experts(model.model.layers[1].mlp.original.experts)


def test_a_weight_that_is_not_finite_is_named_and_the_model_unchanged() -> None:
    model = mixtral()
    before = {name: id(value) for name, value in model.named_parameters()}
    experts_of(model, 1).down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.down_proj\.2: "):
        qlora.quantize_model(model, QLoRAConfig(rank=2))
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert all(value.requires_grad for value in model.parameters())


def test_on_the_meta_device_all_sizes_are_the_same() -> None:
    config = QLoRAConfig(rank=2)
    with torch.device("meta"):
        shapes = gpt_oss()
    assert qlora.quantize_model(shapes, config) == qlora.quantize_model(gpt_oss(), config)


def test_a_module_in_two_places_is_one() -> None:
    dense = experts_of(mixtral())
    model = nn.ModuleDict({"a": dense, "b": dense})
    report = qlora.quantize_model(model, QLoRAConfig(rank=2))
    assert model["a"] is model["b"]
    assert len(report.quantized) == 2 * 2 * EXPERTS
    assert report.quantized_parameters == EXPERTS * 3 * INNER * HIDDEN
    assert qlora.merge(model)["a"] is model["b"]


def test_a_module_of_experts_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="model must contain its experts"):
        qlora.quantize_model(experts_of(mixtral()), QLoRAConfig())


# --- What is left alone -----------------------------------------------------------------------------


def _own_forward(module: nn.Module) -> None:
    module.forward = lambda *given: module.gate_up_proj


def _parallel(module: nn.Module) -> None:
    module._is_expert_parallel = True


def _normed(module: nn.Module) -> None:
    module.has_post_expert_norm = True


def _more(module: nn.Module) -> None:
    module.register_parameter("scale", nn.Parameter(torch.ones(EXPERTS)))


def _buffered(module: nn.Module) -> None:
    module.register_buffer("counts", torch.ones(EXPERTS))


def _fewer(module: nn.Module) -> None:
    module.num_experts = EXPERTS - 1


def _flat(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.ones(EXPERTS, HIDDEN * INNER))


def _integer(module: nn.Module) -> None:
    kept = nn.Parameter(module.down_proj.data.to(torch.int8), requires_grad=False)
    module.down_proj = kept


def _wrapped(module: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Identity())


@pytest.mark.parametrize(
    "change",
    [_own_forward, _parallel, _normed, _more, _buffered, _fewer, _flat, _integer, _wrapped],
)
def test_experts_that_mean_something_else_are_left_alone(
    change: Callable[[nn.Module], None],
) -> None:
    module = experts_of(mixtral())
    assert is_experts(module)
    change(module)
    assert not is_experts(module)


def test_a_class_without_transformers_decorator_is_left_alone() -> None:
    original = type(experts_of(mixtral()))

    class Mine(original):  # type: ignore[misc, valid-type]
        def forward(self, *given: Tensor) -> Tensor:
            return given[0]

    module = Mine(mixtral().config)
    assert not is_experts(module)
    report = qlora.quantize_model(
        nn.ModuleDict({"experts": module, "linear": nn.Linear(4, 4)}), QLoRAConfig(rank=2)
    )
    assert report.quantized == ("linear",)
    assert {name for name, _ in report.other_dense} == {f"experts.{name}" for name in NAMES}


def test_experts_without_a_gate() -> None:
    """As those of Nemotron-H."""

    @use_experts_implementation(has_gate=False)
    class Plain(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.ReLU()
            self.up_proj = nn.Parameter(torch.randn(3, 6, 8))
            self.down_proj = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            raise AssertionError

    config = hf.MixtralConfig()
    config._experts_implementation = "batched_mm"
    dense = Plain(config)
    model = nn.ModuleDict({"experts": copy.deepcopy(dense)})
    report = qlora.quantize_model(model, QLoRAConfig(rank=2, format=None))
    assert report.adapted[0] == "experts.up_proj.0"
    x = torch.randn(4, 8)
    chosen, shares = routing(4, experts=3)
    torch.testing.assert_close(model["experts"](x, chosen, shares), dense(x, chosen, shares))


# --- What is done with them -------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("format", ["nf4", None])
def test_merged_it_is_a_usual_model_again(make: Make, format: str | None, tmp_path: Path) -> None:
    model, original = adapted(make, format=format), make()
    expected = tiny.logits(model, tiny.tokens())
    qlora.merge(model)
    assert type(experts_of(model)) is type(experts_of(original))
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    torch.testing.assert_close(tiny.logits(model, tiny.tokens()), expected)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    torch.testing.assert_close(tiny.logits(loaded, tiny.tokens()), expected)
    again = tiny.quantized(loaded)  # and can be converted again
    assert isinstance(experts_of(again), QLoRAExperts)


@pytest.mark.parametrize("make", [qwen3, gpt_oss])
def test_a_folder_in_4_bits(make: Make, tmp_path: Path) -> None:
    """transformers merges the weights of one as it reads them; those of the other are read one by one."""
    folder = tiny.model_folder(tmp_path / "dense", make())
    assert main(["quantize", str(folder), str(tmp_path / "4bit"), "--device", "cpu"]) == 0
    config = QLoRAConfig(rank=2)
    models = []
    for place in (folder, tmp_path / "4bit"):
        torch.manual_seed(0)
        models.append(load_quantized(place, config, precision="float32", device="cpu"))
    (model, report), (again, same) = models
    assert report == same
    assert isinstance(experts_of(again), QLoRAExperts)
    assert torch.equal(tiny.logits(again, tiny.tokens()), tiny.logits(model, tiny.tokens()))
    expected = make()
    qlora.quantize_model(expected, config)
    assert torch.equal(tiny.logits(again, tiny.tokens()), tiny.logits(expected, tiny.tokens()))


def test_layers_that_are_not_merged_are_not_stacked() -> None:
    model = adapted(mixtral)
    assert restore_experts(model) is model
    assert isinstance(experts_of(model), QLoRAExperts)


@pytest.mark.parametrize("training", [True, False])
def test_all_stay_in_training_or_in_evaluation(training: bool) -> None:
    model = mixtral().train(training)
    qlora.quantize_model(model, QLoRAConfig(rank=2))
    assert all(module.training == training for module in model.modules())
    qlora.merge(model.train(not training))
    assert all(module.training != training for module in experts_of(model).modules())


def test_the_dense_weights_are_let_go() -> None:
    model = mixtral()
    stacked = [weakref.ref(parameter) for parameter in experts_of(model).parameters()]
    qlora.quantize_model(model, QLoRAConfig(rank=2))
    gc.collect()
    assert [reference() for reference in stacked] == [None, None]


def test_a_copy_and_a_state_dict_are_whole() -> None:
    model = adapted(mixtral)
    expected = tiny.logits(model, tiny.tokens())
    twin = copy.deepcopy(model)
    assert torch.equal(tiny.logits(twin, tiny.tokens()), expected)
    other = adapted(mixtral, seed=1)
    assert not torch.equal(tiny.logits(other, tiny.tokens()), expected)
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=False)
    embedded = {k: v for k, v in model.state_dict().items() if "experts" in k}
    assert "model.layers.0.mlp.experts.down_proj.4.packed" in embedded
    assert torch.equal(tiny.logits(other, tiny.tokens()), expected)


def test_each_row_of_the_batch_has_its_own_adapter() -> None:
    model = adapted(mixtral)
    qlora.add_adapter(model, QLoRAConfig(rank=3, target_modules=["q_proj", "down_proj"]), "b")
    tiny.randomize_adapter(model, seed=9)
    ids = tiny.tokens(rows=5)
    rows = ["b", None, "default", "b", "default"]
    with qlora.use_adapter(model, rows):
        y = tiny.logits(model, ids)
        assert torch.equal(tiny.logits(model, ids), y)
    for name in ("b", None, "default"):
        with qlora.use_adapter(model, name):
            alone = tiny.logits(model, ids)
        own = [i for i, other in enumerate(rows) if other == name]
        torch.testing.assert_close(y[own], alone[own])
    with qlora.use_adapter(model, rows), pytest.raises(ValueError, match="as many tokens in each"):
        experts_of(model)(torch.randn(9, HIDDEN), *routing(9))
    assert all(layer.rows is None for layer in layers_of(model).values())


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_torch"])
def test_training_lowers_the_loss(optimizer: str, tmp_path: Path) -> None:
    model = tiny.quantized(qwen3(num_experts=8))
    config = TrainConfig(
        learning_rate=1e-2,
        steps=8,
        micro_batch_size=2,
        gradient_accumulation_steps=1,
        optimizer=optimizer,
    )
    before = experts_of(model).down_proj[0].packed.clone()
    runs.train(model, tiny.examples(), config, tmp_path, progress=False)
    losses = [record["loss"] for record in runs.metrics(tmp_path) if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(experts_of(model).down_proj[0].packed, before)
    assert sum(bool(layer.lora_b.any()) for layer in layers_of(model).values()) > 8


@pytest.mark.parametrize("make", MAKES)
def test_the_planner_counts_them(make: Make) -> None:
    lora = QLoRAConfig(rank=4)
    model = make()
    train = TrainConfig(micro_batch_size=2, max_length=16, precision="float32")
    plan = plan_memory(model.config, lora, train)
    qlora.quantize_model(model, lora)
    held = static_bytes(model)
    assert (plan.weights, plan.scales, plan.adapters) == (
        held["weights"],
        held["scales"],
        held["adapters"],
    )
    assert plan.gradients == plan.adapters
    assert plan.activations > 0


def test_slices_keep_the_stacked_parameter() -> None:
    dense = experts_of(gpt_oss())
    linears = expert_linears(dense)
    assert list(linears)[: EXPERTS + 1] == [
        *(f"gate_up_proj.{i}" for i in range(EXPERTS)),
        "down_proj.0",
    ]
    one = linears["gate_up_proj.2"]
    assert torch.equal(one.weight, dense.gate_up_proj[2].mT)
    assert torch.equal(one.bias, dense.gate_up_proj_bias[2])
    assert (
        one.weight.untyped_storage().data_ptr() == dense.gate_up_proj.untyped_storage().data_ptr()
    )
