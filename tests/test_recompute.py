"""Gradient checkpointing, and its checkpoints on the host: less memory, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import recompute
from qlora.adapters import adapter_parameters
from qlora.recompute import recomputing
from qlora.train import train
from tests import tiny
from tests.on_device import compiled_only
from tests.runs import SMALL, metrics, model, run, same

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, compiled_only])]


def gradients(net: torch.nn.Module, **options: Any) -> list[Tensor]:
    """Of a step on the net's device, with dropout."""
    device = next(net.parameters()).device
    net.train()
    torch.manual_seed(0)
    with recomputing(net, **options):
        net(tiny.tokens().to(device)).logits.square().mean().backward()
    found = [p.grad.clone() for p in adapter_parameters(net).values()]
    net.zero_grad()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_gradients_are_bit_identical(make: Callable[[], torch.nn.Module], device: str) -> None:
    net = tiny.randomize_adapter(tiny.quantized(make(), dropout=0.1)).to(device)
    plain = gradients(net, enabled=False)
    for offload in (False, True):
        assert all(map(torch.equal, gradients(net, offload=offload), plain))


def test_a_run_with_offloaded_checkpoints_is_bit_identical(tmp_path: Path) -> None:
    config = replace(SMALL, offload_checkpoints=True)
    assert same(run(tmp_path / "host", config)[0], run(tmp_path / "device")[0])
    assert metrics(tmp_path / "host") == metrics(tmp_path / "device")


def test_a_run_may_go_on_with_checkpoints_elsewhere(tmp_path: Path) -> None:
    run(tmp_path, replace(SMALL, steps=3))
    config = replace(SMALL, offload_checkpoints=True)
    assert same(run(tmp_path, config)[0], run(tmp_path / "whole")[0])


@pytest.mark.parametrize("offload", [True, False])
def test_what_goes_to_the_host_is_a_hidden_state_per_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    """The input of the first block needs no gradient, as the embedding is frozen."""
    sent: list[tuple[int, ...]] = []

    def to_host(tensor: Tensor) -> Tensor:
        sent.append(tuple(tensor.shape))
        return tensor.detach().clone()

    monkeypatch.setattr(recompute, "_to_host", to_host)
    net = tiny.quantized(tiny.llama(num_hidden_layers=4))
    inputs: list[tuple[int, ...]] = []
    for block in net.model.layers[1:]:
        block.input_layernorm.register_forward_pre_hook(lambda _, x: inputs.append(x[0].shape))
    config = replace(SMALL, steps=1, offload_checkpoints=offload)
    train(net, tiny.examples(), config, tmp_path, progress=False)
    first_pass = [tuple(shape) for i in range(0, len(inputs), 6) for shape in inputs[i : i + 3]]
    assert sent == (first_pass if offload else [])
    assert len(first_pass) == 3 * 2, "blocks times micro-batches, each computed twice"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())


def test_masks_and_tables_stay_where_they_are() -> None:
    mask, table = torch.ones(3, dtype=torch.bool), torch.ones(3)
    for tensor in (mask, table):
        packed = recompute._pack(tensor)
        assert packed[0] is tensor
        assert recompute._unpack(packed) is tensor
    hidden = torch.randn(4, 6, requires_grad=True).mT
    host, device = recompute._pack(hidden)
    assert device == torch.device("cpu")
    assert not host.requires_grad
    assert host.data_ptr() != hidden.data_ptr()
    assert host.stride() == hidden.stride()
    assert torch.equal(recompute._unpack((host, device)), hidden)


@pytest.mark.gpu
def test_on_a_gpu_the_host_memory_is_pinned() -> None:
    hidden = torch.randn(4, 6, device="cuda", requires_grad=True)
    host, device = recompute._pack(hidden)
    assert host.is_pinned()
    assert device == hidden.device
    assert torch.equal(recompute._unpack((host, device)), hidden)


@pytest.mark.gpu
@compiled_only
def test_offloading_frees_gpu_memory() -> None:
    """A hidden state of each block but the first, less on the GPU when the backward pass begins."""
    net, held = model().to("cuda").train(), []
    ids = tiny.tokens(rows=8, length=256).cuda()
    net(ids).logits.float().mean().backward()  # the first products allocate what cuBLAS works in
    net.zero_grad()
    for offload in (False, True):
        with recomputing(net, offload=offload):
            before = torch.cuda.memory_allocated()
            loss = net(ids).logits.float().mean()
            held.append(torch.cuda.memory_allocated() - before)
            loss.backward()
        net.zero_grad()
    hidden_bytes = ids.numel() * net.config.hidden_size * 4
    assert held[0] - held[1] >= hidden_bytes * (len(net.model.layers) - 1)
