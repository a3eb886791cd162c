"""A decoder layer of Llama 3 8B's shape: forward and backward over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.clocks import Call
from benchmarks.harness import Case, Contender
from benchmarks.models import (
    OURS,
    PEFT_BITSANDBYTES,
    PEFT_DENSE,
    Trained,
    adapter_parameters,
    check_gradients,
)
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle

RANK = 64
TARGETS = {PEFT_BITSANDBYTES: 1.3}

LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BATCH, _TINY_BATCH = (4, 2048), (2, 32)


def decoder_cases(device: torch.device, dtypes: list[torch.dtype], quick: bool) -> list[Case]:
    """One case for each dtype on a GPU; with `quick`, a tiny layer anywhere."""
    if quick:
        return [_case(device, dtype, "tiny", _TINY, _TINY_BATCH, {}) for dtype in dtypes]
    if device.type != "cuda":
        return []
    return [_case(device, dtype, "Llama 3 8B", LLAMA3_8B, _BATCH, TARGETS) for dtype in dtypes]


def _case(
    device: torch.device,
    dtype: torch.dtype,
    model: str,
    shape: Mapping[str, float],
    batch: tuple[int, int],
    targets: Mapping[str, float],
) -> Case:
    sequences, length = batch
    dtype_name = str(dtype).removeprefix("torch.")
    return Case(
        group="decoder",
        name=f"{model} layer, {sequences} x {length}, {dtype_name}, rank {RANK}",
        parameters={
            "model": model,
            **shape,
            "tokens": sequences * length,
            "rank": RANK,
            "dtype": dtype_name,
        },
        inputs=partial(DecoderInputs, device, dtype, shape, batch),
        contenders=(
            _contender(OURS, lambda i: i.ours),
            _contender(
                PEFT_BITSANDBYTES,
                lambda i: i.peft(i.bitsandbytes()),
                peers.PEFT_OVER_BITSANDBYTES,
            ),
            _contender(PEFT_DENSE, lambda i: i.peft(i.base()), peers.PEFT),
        ),
        targets=targets,
        device=device,
        operations=operations(shape, sequences, length),
    )


def operations(shape: Mapping[str, float], sequences: int, length: int) -> int:
    """Of all products of both passes: base, adapters, and the causal half of attention."""
    hidden, wide = int(shape["hidden_size"]), int(shape["intermediate_size"])
    narrow = hidden * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    linears = [(hidden, hidden)] * 2 + [(narrow, hidden)] * 2 + [(wide, hidden)] * 3
    m = sequences * length
    layers = sum(4 * m * n * k + 6 * m * RANK * (n + k) for n, k in linears)
    return layers + 6 * m * length * hidden


class DecoderInputs(Trained):
    """The layer in the forms that the contenders train, and what it is applied to."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: Mapping[str, float],
        batch: tuple[int, int],
        seed: int,
        dora: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        super().__init__(_load(shape, device), device, dtype, RANK, dora)
        size = (*batch, int(shape["hidden_size"]))
        self.x, self.grad_y = (torch.randn(size, device=device).to(dtype) for _ in range(2))

    @cached_property
    def plain(self) -> list[Tensor]:
        """What the dense layer returns."""
        return by_sequence(self.dense(), self.x, self.grad_y)

    @cached_property
    def oracle(self) -> list[Tensor]:
        """The same in fp64 (transformers' norms round to fp32 all the same)."""
        return by_sequence(self.exact(), self.x.double(), self.grad_y.double())


def _load(shape: Mapping[str, float], device: torch.device) -> nn.Module:
    """A Llama of one layer, without the norm that follows the last one; its vocabulary is not used."""
    with peers.quiet():
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(**shape, vocab_size=8, num_hidden_layers=1, pad_token_id=None)
        with device:
            model = LlamaModel(config)
    model.norm = nn.Identity()
    return model


def _contender(
    name: str, model: Callable[[DecoderInputs], nn.Module], requires: tuple[str, ...] = ()
) -> Contender:
    """One that trains this model; a peer does so under autocast."""

    def prepare(inputs: DecoderInputs) -> Call:
        call = forward_backward(model(inputs), inputs.x, inputs.grad_y)
        return peers.autocast(inputs.device, inputs.dtype)(call) if requires else call

    return Contender(name, prepare, _check, requires, model)


def forward_backward(model: nn.Module, x: Tensor, grad_y: Tensor) -> Call:
    """A call that returns y and the gradients of x and of the adapters."""
    leaf = x.clone().requires_grad_()
    parameters = adapter_parameters(model)

    def call() -> list[Tensor]:
        y = model(inputs_embeds=leaf, use_cache=False).last_hidden_state
        return [y.detach(), *torch.autograd.grad(y, (leaf, *parameters), grad_y)]

    return call


def by_sequence(model: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """The same, one sequence at a time: fp64's attention would not fit into memory otherwise."""
    parts = [
        forward_backward(model, *one)() for one in zip(x.split(1), grad_y.split(1), strict=True)
    ]
    y, grad_x, *gradients = zip(*parts, strict=True)
    return [torch.cat(y), torch.cat(grad_x), *(torch.stack(g).sum(0) for g in gradients)]


def _check(inputs: DecoderInputs, tensors: list[Tensor]) -> None:
    """By the tolerance rule, the adapters' gradients of a kind as one vector."""
    if len(tensors) != 2 + len(adapter_parameters(inputs.ours)):
        raise AssertionError(f"expected y and all gradients; got {len(tensors)} tensors")
    for i, factor in ((0, FORWARD_FACTOR), (1, GRADIENT_FACTOR)):
        assert_close_to_oracle(tensors[i], inputs.plain[i], inputs.oracle[i], factor)
    check_gradients(tensors[2:], inputs.plain[2:], inputs.oracle[2:])
