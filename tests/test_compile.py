"""The quantized model in torch's own tools: `torch.compile`, `torch.export`, autocast, casts and copies."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import qlora
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import tiny

IDS = tiny.tokens()
INDUCTOR = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def model(**settings: Any) -> nn.Module:
    """One layer: what is compiled is the same for each, and takes its time."""
    return tiny.adapted(lambda: tiny.llama(num_hidden_layers=1), **settings)


def two_adapters() -> nn.Module:
    made = model()
    qlora.add_adapter(made, qlora.QLoRAConfig(rank=2), "b")
    return tiny.randomize_adapter(made, seed=7)


def weighted() -> nn.Module:
    made = two_adapters()
    qlora.set_adapter(made, {"default": 0.5, "b": 2.0})
    return made


def compiled(plain: nn.Module, backend: str = "aot_eager", **options: Any) -> nn.Module:
    return torch.compile(plain, fullgraph=True, backend=backend, **options)


def step(
    forward: nn.Module, plain: nn.Module, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The logits, and all gradients by name."""
    plain.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = forward(IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | {name: grad.clone() for name, grad in grads.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# --- torch.compile ----------------------------------------------------------------------------------


def test_there_is_no_graph_break() -> None:
    explained = torch._dynamo.explain(model())(IDS)
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: model(dropout=0.3),
    "dora": lambda: model(dora=True, dropout=0.3),
    "weighted sum": weighted,
    "modules_to_save": lambda: model(modules_to_save=["lm_head"]),
    "dense base": lambda: model(format=None, dropout=0.3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_is_one_graph(name: str) -> None:
    """Forward and backward, with the same random numbers: the same bits."""
    plain = VARIANTS[name]().train()
    expected = step(plain, plain)
    assert len(expected) > 14
    assert_equal(step(compiled(plain), plain), expected)


def test_inference_is_one_graph() -> None:
    plain = model()
    assert torch.equal(tiny.logits(compiled(plain), IDS), tiny.logits(plain, IDS))


def test_under_autocast() -> None:
    """Gradients of the same tensor are added in another order, as in a model without our layers."""
    plain = model(dropout=0.3).train()
    expected = step(plain, plain, torch.bfloat16)
    actual = step(compiled(plain), plain, torch.bfloat16)
    assert actual.keys() == expected.keys()
    assert torch.equal(actual["logits"], expected["logits"])
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        difference = (actual[name] - value).abs().max()
        assert difference <= 2 * torch.finfo(torch.bfloat16).eps * value.abs().max(), name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_with_gradient_checkpointing() -> None:
    """Recomputing draws the same dropout again. PEFT had to mend that: huggingface/peft#3020."""
    plain = model(dropout=0.3).train()
    expected = step(plain, plain)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    plain.disable_input_require_grads()  # a hook of transformers' that nothing compiles in one graph
    assert_equal(step(compiled(plain), plain), expected)


def test_compiled_once_for_batches_of_any_shape() -> None:
    plain, counter, counts = model(), CompileCounterWithBackend("aot_eager"), set()
    forward = torch.compile(plain, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((2, 12), (3, 12), (2, 17), (4, 31)):
        ids = tiny.tokens(*shape)
        assert torch.equal(tiny.logits(forward, ids), tiny.logits(plain, ids)), shape
        counts.add(counter.frame_count)
    assert len(counts) == 1


def test_switching_adapters_compiles_once_for_each() -> None:
    plain, counter = two_adapters(), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(plain, fullgraph=True, backend=counter)

    def same(context: AbstractContextManager[Any]) -> int:
        with context:
            assert torch.equal(tiny.logits(forward, IDS), tiny.logits(plain, IDS))
        return counter.frame_count

    assert same(nullcontext()) == 1
    assert same(qlora.use_adapter(plain, "b")) == 2
    assert same(qlora.use_adapter(plain, ["b", None])) == 3
    assert same(qlora.disable_adapters(plain)) == 4
    assert same(nullcontext()) == same(qlora.use_adapter(plain, "b")) == 4


def test_trained_values_are_seen_without_compiling_again() -> None:
    plain, counter = model(), CompileCounterWithBackend("aot_eager")
    forward = torch.compile(plain, fullgraph=True, backend=counter)
    before = tiny.logits(forward, IDS)
    tiny.randomize_adapter(plain, seed=8)
    after = tiny.logits(forward, IDS)
    assert torch.equal(after, tiny.logits(plain, IDS))
    assert not torch.equal(after, before)
    assert counter.frame_count == 1


@INDUCTOR
def test_inductor() -> None:
    """It may reorder sums: held to the tolerance rule, with the uncompiled model as plain PyTorch."""
    plain = model().train()
    actual, eager = step(compiled(plain, "inductor"), plain), step(plain, plain)
    plain.double()
    oracle = step(plain, plain)
    assert actual.keys() == eager.keys() == oracle.keys()
    for name, value in actual.items():
        factor = FORWARD_FACTOR if name == "logits" else GRADIENT_FACTOR
        assert_close_to_oracle(value, eager[name], oracle[name], factor)


@INDUCTOR
def test_inductor_drops_the_same_elements_in_backward() -> None:
    """Its random numbers are not eager's. The adapter's part of a sum is linear in B, and in A."""
    config = qlora.QLoRAConfig(rank=4, dropout=0.5)
    torch.manual_seed(0)
    layer = qlora.QLoRALinear.from_linear(nn.Linear(64, 32), config).train()
    tiny.randomize_adapter(layer)
    forward = torch.compile(layer, fullgraph=True, backend="inductor")
    x, weights = torch.randn(7, 64), torch.randn(7, 32)
    base = qlora.qlora_linear(x, layer.weight, layer.bias)
    for _ in range(2):
        layer.zero_grad()
        loss = ((forward(x) - base) * weights).sum()
        loss.backward()
        for factor in (layer.lora_a, layer.lora_b):
            torch.testing.assert_close((factor.detach() * factor.grad).sum(), loss.detach())


# --- torch.export -----------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids, use_cache=False).logits


def exported(plain: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    shapes = {"ids": {0: Dim("rows", max=64), 1: Dim("length", min=2, max=200)}}
    with torch.no_grad():
        return export(Logits(plain), (IDS,), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_answers_as_the_model(strict: bool) -> None:
    """For batches of any shape; each layer is one call of `qlora::qlora_forward`, its buffers are inputs."""
    plain = model()
    program = exported(plain, strict)
    for shape in ((2, 12), (1, 5), (3, 30)):
        ids = tiny.tokens(*shape)
        assert torch.equal(program.module()(ids), tiny.logits(plain, ids))
    calls = [str(node.target) for node in program.graph.nodes if "qlora" in str(node.target)]
    assert calls == ["qlora.qlora_forward.default"] * 7
    state = program.state_dict
    assert torch.equal(state[f"inner.{LAYER}.packed"], plain.get_submodule(LAYER).packed)


def test_an_exported_model_is_a_file(tmp_path: Path) -> None:
    """It is loaded where `import qlora` has registered the op."""
    plain = model().bfloat16()
    torch.export.save(exported(plain), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(program.module()(IDS), tiny.logits(plain, IDS))


def test_an_exported_program_is_for_inference() -> None:
    """The op has no gradient of its own: with gradients on, nothing is kept of the decoded weights."""
    layer = model().get_submodule(LAYER)
    program = export(layer, (torch.ones(2, 64),)).module()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda kept: kept):
        y = program(torch.ones(2, 64))
    assert torch.equal(y, layer(torch.ones(2, 64)))
    assert saved == []


@pytest.mark.parametrize("name", ["dora", "weighted sum", "modules_to_save"])
def test_exported_variants(name: str) -> None:
    plain = VARIANTS[name]().eval()
    assert torch.equal(exported(plain).module()(IDS), tiny.logits(plain, IDS))


# --- Autocast, casts and copies ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_autocast(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Computes in 16 bits, with adapters and gradients in fp32; switched off within, it is as if never on."""
    plain = tiny.adapted(make)
    expected = plain(IDS).logits
    with torch.autocast("cpu", dtype=dtype):
        out = plain(IDS, labels=IDS)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(plain(IDS).logits, expected)
    assert out.logits.dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert 0 < (out.logits - expected).abs().max() < rounding
    out.loss.backward()
    grads = [p.grad for name, p in plain.named_parameters() if "lora_" in name]
    assert grads
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_a_gradient_scaler() -> None:
    plain = model()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = plain(IDS, labels=IDS).loss
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2**16  # no gradient overflowed
    assert plain(IDS, labels=IDS).loss < loss


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda module: module.to(torch.bfloat16),
    "to(dtype=)": lambda module: module.to(dtype=torch.float64),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("settings", [{}, {"dora": True}], ids=["lora", "dora"])
def test_casts_leave_the_base_as_it_is(name: str, settings: dict[str, Any]) -> None:
    plain = model(**settings)
    layer = plain.get_submodule(LAYER)
    before = layer.base_weight()
    scales = {key: getattr(layer, key).dtype for key in ("packed", "absmax", "nested_absmax")}
    logits = tiny.logits(CASTS[name](plain), IDS)
    assert logits.dtype == plain.dtype == layer.base_dtype == layer.lora_a.dtype
    assert logits.isfinite().all()
    assert {key: getattr(layer, key).dtype for key in scales} == scales
    assert torch.equal(layer.base_weight(), before)


def test_a_copy_is_a_model_of_its_own() -> None:
    plain = two_adapters()
    qlora.set_adapter(plain, "b")
    twin = copy.deepcopy(plain)
    expected = tiny.logits(plain, IDS)
    assert torch.equal(tiny.logits(twin, IDS), expected)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.detach().zero_()
    qlora.set_adapter(twin, None)
    assert torch.equal(tiny.logits(plain, IDS), expected)


def test_a_factor_can_be_parametrized() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer, x = model().get_submodule(LAYER), torch.ones(1, 64)
    base = qlora.qlora_linear(x, layer.weight)
    expected = 2 * (layer(x) - base)
    adapter = layer.adapters["default"]
    nn.utils.parametrize.register_parametrization(adapter, "lora_b", Double())
    torch.testing.assert_close(layer(x) - base, expected)
    layer(x).sum().backward()
    assert adapter.parametrizations.lora_b.original.grad.any()
