"""One fine-tuning step of SmolLM2-135M: forward, backward, clipping, AdamW."""

from __future__ import annotations

import itertools
import os
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.clocks import Call
from benchmarks.harness import Case, Contender
from benchmarks.models import (
    DENSE,
    OURS,
    PEFT_BITSANDBYTES,
    PEFT_DENSE,
    Trained,
    adapter_parameters,
    check_gradients,
)

SEQUENCES, LENGTH = 4, 128
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 0.3
BATCHES = 4
TARGETS = {DENSE: 1 / 1.35, PEFT_BITSANDBYTES: 1.0}
"""On a CPU, and required there: a step that misses one makes the run a failure."""

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
_QUICK_LAYERS = 3


def step_cases(device: torch.device, dtypes: list[torch.dtype], quick: bool) -> list[Case]:
    """LoRA of rank 16, and Guanaco's 64, in each dtype; with `quick`, rank 16 and a few layers."""
    settings = itertools.product(dtypes, (16,) if quick else (16, 64))
    return [_step_case(device, dtype, rank, quick) for dtype, rank in settings]


def _step_case(device: torch.device, dtype: torch.dtype, rank: int, quick: bool) -> Case:
    layers = _QUICK_LAYERS if quick else SMOLLM2["num_hidden_layers"]
    weights = "random" if quick or cached_model() is None else "SmolLM2-135M-Instruct"
    dtype_name = str(dtype).removeprefix("torch.")
    cut = f" cut to {layers} layers" if quick else ""
    return Case(
        group="step",
        name=f"SmolLM2-135M{cut}, {SEQUENCES} x {LENGTH}, {dtype_name}, rank {rank}",
        parameters={
            "model": "SmolLM2-135M",
            "weights": weights,
            "layers": layers,
            "tokens": SEQUENCES * LENGTH,
            "rank": rank,
            "dtype": dtype_name,
        },
        inputs=partial(StepInputs, device, dtype, rank, layers, weights != "random"),
        contenders=(
            Contender(OURS, lambda i: training_step(i, i.ours), _check),
            Contender(DENSE, lambda i: training_step(i, i.dense()), _check),
            Contender(PEFT_DENSE, lambda i: _peft(i, i.base()), _check, peers.PEFT),
            Contender(
                PEFT_BITSANDBYTES,
                lambda i: _peft(i, i.bitsandbytes()),
                _check,
                peers.PEFT_OVER_BITSANDBYTES,
            ),
        ),
        # The criterion is about the whole model: in a few layers the output embedding weighs too much.
        targets={} if quick or device.type != "cpu" else TARGETS,
        required=device.type == "cpu",
        device=device,
    )


def cached_model() -> Path | None:
    """The folder into which `python -m paper_repro` converts SmolLM2, if it has."""
    cache = Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora")
    folder = cache / "models" / "smollm2-135m-instruct"
    return folder if (folder / "config.json").is_file() else None


class StepInputs(Trained):
    """The model in the forms that the contenders train, and the batches."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        layers: int,
        real_weights: bool,
        seed: int,
        dora: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        shape = (BATCHES, SEQUENCES, LENGTH)
        self.batches = torch.randint(SMOLLM2["vocab_size"], shape).to(device)
        super().__init__(_load(layers, real_weights), device, dtype, rank, dora)

    @cached_property
    def plain(self) -> list[Tensor]:
        """What a step over the dense base returns."""
        return training_step(self, self.dense())()

    @cached_property
    def oracle(self) -> list[Tensor]:
        """The same in fp64 (transformers' norms round to fp32 all the same)."""
        return training_step(self, self.exact())()


def _load(layers: int, real_weights: bool) -> nn.Module:
    with peers.quiet():
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        if real_weights:
            return AutoModelForCausalLM.from_pretrained(cached_model(), dtype=torch.float32)
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2 | {"num_hidden_layers": layers}))


def _peft(inputs: StepInputs, model: nn.Module) -> Call:
    step = training_step(inputs, inputs.peft(model))
    return peers.autocast(inputs.device, inputs.dtype)(step)


def training_step(inputs: StepInputs, model: nn.Module) -> Call:
    """A call that takes the next step and returns the loss and the clipped gradients."""
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = itertools.cycle(inputs.batches)

    def step() -> list[Tensor]:
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        gradients = [p.grad for p in parameters]
        optimizer.zero_grad()
        return [loss.detach(), *gradients]

    return step


def _check(inputs: StepInputs, tensors: list[Tensor]) -> None:
    """The gradients by the tolerance rule, all of a kind as one vector; the loss nearly."""
    loss, exact_loss = tensors[0].double(), inputs.oracle[0].double()
    tolerance = 16 * torch.finfo(inputs.dtype).eps
    if not abs(loss - exact_loss) <= tolerance * abs(exact_loss):
        raise AssertionError(f"loss {loss:.7f}, the fp64 oracle has {exact_loss:.7f}")
    check_gradients(tensors[1:], inputs.plain[1:], inputs.oracle[1:])
