"""What only a GPU can show: offsets beyond 32 bits, no synchronization, CUDA graphs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from qlora.kernels import double_quant, fused_linear, linear, lora, many_tokens, nf4, ops, reference
from qlora.paged import PagedAdamW
from qlora.testing import relative_rmse
from tests.on_device import assert_identical, compiled_only

pytestmark = [pytest.mark.gpu, compiled_only]

FORMAT = ("nf4", 64, "dynamic8")


def test_more_than_2_to_the_31_elements() -> None:
    """Quantize and dequantize past the reach of 32-bit offsets: the tail is that of the tail alone."""
    numel, tail = 2**31 + 4099, 2**31 - 4096
    x = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_()
    packed, absmax = nf4.quantize_4bit(x, "nf4", 64)
    expected = reference.quantize_4bit(x[tail:].cpu(), "nf4", 64)
    assert_identical((packed[tail // 2 :].cpu(), absmax[tail // 64 :].cpu()), expected)
    del x
    y = nf4.dequantize_4bit(packed, absmax, None, None, "nf4", 64, "", [numel], torch.bfloat16)
    rest = (None, None, "nf4", 64, "", [numel - tail], torch.bfloat16)
    assert_identical(y[tail:].cpu(), reference.dequantize_4bit(*expected, *rest))


@pytest.mark.parametrize("kernel", [fused_linear, many_tokens], ids=["fused", "many"])
def test_activations_beyond_2_to_the_31_elements(kernel: ModuleType) -> None:
    """The last tokens of a batch whose x and y pass 32-bit offsets are those of a short batch."""
    k = n = 4096
    m = 2**31 // k + 40
    weight, _, lora_b = _layer(n, k)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda").normal_()
    h = torch.empty(m, 16, dtype=torch.bfloat16, device="cuda").normal_()
    y = kernel.forward(x, *weight, None, h, lora_b, 0.5, *FORMAT)
    expected = kernel.forward(x[-128:], *weight, None, h[-128:], lora_b, 0.5, *FORMAT)
    # cuBLAS may sum in another order for another number of tokens.
    assert relative_rmse(y[-128:], expected) < 2e-3


def _layer(n: int, k: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Double-quantized weight, A and B on the GPU, in bf16."""
    packed, absmax = nf4.quantize_4bit(torch.randn(n, k, device="cuda"), "nf4", 64)
    weight = (packed, *double_quant.quantize_absmax(absmax, "dynamic8"))
    lora_a = torch.randn(16, k, device="cuda", dtype=torch.bfloat16) / k**0.5
    return weight, lora_a, torch.randn(n, 16, device="cuda", dtype=torch.bfloat16)


def _step(x: Tensor, grad_y: Tensor, rng: Tensor, layer: tuple) -> tuple[Tensor, ...]:
    """Everything a training step launches."""
    weight, lora_a, lora_b = layer
    y, h = linear.qlora_forward(x, *weight, None, lora_a, lora_b, rng, 0.5, 0.1, *FORMAT)
    g = lora.lora_project(grad_y, lora_b.mT, None, 0.0)
    grad_x = linear.qlora_grad_x(grad_y, g, *weight, lora_a, rng, 0.5, 0.1, *FORMAT)
    grad_a = lora.lora_grad(g, x, rng, 0.5, 0.1)
    return y, grad_x, grad_a, lora.lora_grad(grad_y, h, None, 0.5, 0.0)


@pytest.fixture(params=[1, 300, 1100], ids=["few", "some", "many"])
def step_inputs(request: pytest.FixtureRequest) -> tuple:
    m = request.param
    x, grad_y = (torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for n in (512, 768))
    rng = torch.tensor([1, 2], device="cuda")
    inputs = (x, grad_y, rng, _layer(768, 512))
    _step(*inputs)  # compiles, and fills the caches of codebooks
    return inputs


def test_no_synchronization(step_inputs: tuple) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(*step_inputs)
        packed, absmax = nf4.quantize_4bit(step_inputs[0], "nf4", 64)
        quantized = double_quant.quantize_absmax(absmax, "dynamic8")
        double_quant.dequantize_absmax(*quantized, "dynamic8")
        shape = list(step_inputs[0].shape)
        nf4.dequantize_4bit(packed, *quantized, *FORMAT, shape, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph(step_inputs: tuple) -> None:
    """Replayed with another seed, the graph gives what eager launches give."""
    x, grad_y, rng, layer = step_inputs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = _step(x, grad_y, rng, layer)
    rng.add_(5)
    graph.replay()
    assert_identical(results, _step(x, grad_y, rng, layer))


def test_results_do_not_vary(step_inputs: tuple) -> None:
    assert_identical(_step(*step_inputs), _step(*step_inputs))


def test_an_op_takes_what_requires_a_gradient() -> None:
    """It has no autograd of its own; torch's `out=`, which it may use within, would refuse."""
    weight, lora_a, lora_b = _layer(768, 512)
    x = torch.randn(1100, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y, _ = ops.qlora_forward(x, *weight, None, lora_a, lora_b, None, 0.5, 0.0, *FORMAT)
    assert not y.requires_grad


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_step_does_not_synchronize(bits: int) -> None:
    """Nor do eviction and prefetching: the host runs ahead."""
    params = [torch.nn.Parameter(torch.randn(5000, device="cuda").bfloat16()) for _ in range(3)]
    optimizer = PagedAdamW(params, bits=bits, stochastic_rounding=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()  # compiles, and allocates the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
            optimizer.evict()
            optimizer.prefetch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
