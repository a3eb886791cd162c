"""One fine-tuning step of SmolLM2-135M: forward, backward, clipping, AdamW.

All contenders start from the same adapter over the same weights: what NF4 with double quantization makes of
the model. The dense ones hold that decoded, the 4-bit ones as the same bytes, so that one oracle serves all.
"""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import qlora
from benchmarks import peers
from benchmarks.harness import Call, Case, Contender
from qlora.modules import LoRALayer, QLoRALinear
from qlora.quantized import dequantize_4bit
from qlora.testing import GRADIENT_FACTOR, assert_close_to_oracle

SEQUENCES, LENGTH = 4, 128
ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 16.0, 2e-4, 0.3
BATCHES = 4

OURS = "qlora NF4+DQ"
DENSE = "LoRA over dense"
PEFT_DENSE = "PEFT over dense"
PEFT_BITSANDBYTES = "PEFT over bitsandbytes NF4+DQ"
LIMITS = {DENSE: 1.35, PEFT_BITSANDBYTES: 1.0}

_SMOLLM2 = {
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
    layers = _QUICK_LAYERS if quick else _SMOLLM2["num_hidden_layers"]
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
        check=_check,
        contenders=(
            Contender(OURS, lambda i: training_step(i, i.ours)),
            Contender(DENSE, lambda i: training_step(i, i.dense())),
            Contender(PEFT_DENSE, lambda i: training_step(i, i.peft(i.base())), peers.PEFT),
            Contender(
                PEFT_BITSANDBYTES,
                lambda i: training_step(i, i.peft(i.bitsandbytes())),
                peers.PEFT_OVER_BITSANDBYTES,
            ),
        ),
        # The criterion is about the whole model: in a few layers the output embedding weighs too much.
        limits={} if quick else LIMITS,
    )


def cached_model() -> Path | None:
    """The folder into which `python -m paper_repro` converts SmolLM2, if it has."""
    cache = Path(os.environ.get("QLORA_CACHE") or Path.home() / ".cache" / "qlora")
    folder = cache / "models" / "smollm2-135m-instruct"
    return folder if (folder / "config.json").is_file() else None


@dataclass
class StepInputs:
    """The model in the forms that the contenders train, and the batches."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    layers: int
    real_weights: bool
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        shape = (BATCHES, SEQUENCES, LENGTH)
        self.batches = torch.randint(_SMOLLM2["vocab_size"], shape).to(self.device)
        self._base = self._load().to(self.device, self.dtype).train()
        self.ours = self.base()
        qlora.quantize_model(self.ours, self._config("nf4"))
        for name, layer in self.ours.named_modules():
            if isinstance(layer, QLoRALinear):
                layer.lora_b.data.normal_(std=0.02)  # zeros would hide what is wrong with A
                self._base.get_submodule(name).weight.data = dequantize_4bit(layer.weight)
        self._adapters = {
            name: [t.detach().clone() for t in pair] for name, pair in adapters(self.ours).items()
        }

    def _load(self) -> nn.Module:
        with peers.quiet():
            from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

            if self.real_weights:
                return AutoModelForCausalLM.from_pretrained(cached_model(), dtype=torch.float32)
            return LlamaForCausalLM(LlamaConfig(**_SMOLLM2 | {"num_hidden_layers": self.layers}))

    def _config(self, format: str | None) -> qlora.QLoRAConfig:
        return qlora.QLoRAConfig(rank=self.rank, alpha=ALPHA, format=format)

    def base(self) -> nn.Module:
        """A model of its own that shares the tensors of the base."""
        shared = itertools.chain(self._base.parameters(), self._base.buffers())
        return copy.deepcopy(self._base, {id(tensor): tensor for tensor in shared})

    def dense(self) -> nn.Module:
        """Plain LoRA over the dense base: our module, PyTorch's operations."""
        model = self.base()
        qlora.quantize_model(model, self._config(None))
        return self._with_adapters(model)

    def bitsandbytes(self) -> nn.Module:
        """The base with a Linear4bit in the place of every layer that ours has quantized."""
        model = self.base()
        for name, layer in self.ours.named_modules():
            if isinstance(layer, QLoRALinear):
                parent, _, child = name.rpartition(".")
                linear = peers.bitsandbytes_linear(layer.weight, self.dtype)
                setattr(model.get_submodule(parent), child, linear)
        return model

    def peft(self, model: nn.Module) -> nn.Module:
        """The model with PEFT's LoRA on the layers on which ours has its own."""
        wrapped = peers.peft_model(model, self.rank, ALPHA, "all-linear")
        return self._with_adapters(wrapped)

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        own = adapters(model)
        if own.keys() != self._adapters.keys():
            raise AssertionError(f"has adapters on {len(own)} layers, not on {len(self._adapters)}")
        for name, pair in own.items():
            for parameter, initial in zip(pair, self._adapters[name], strict=True):
                parameter.data = initial.to(parameter.device, parameter.dtype, copy=True)
        return model

    @cached_property
    def plain(self) -> list[Tensor]:
        """What a step over the dense base returns."""
        return training_step(self, self.dense())()

    @cached_property
    def oracle(self) -> list[Tensor]:
        """The same in fp64 (transformers' norms round to fp32 all the same)."""
        model = copy.deepcopy(self.dense()).double()
        return training_step(self, model)()


def adapters(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A and B of ours or of PEFT's, by the name that the layer had in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.lora_a is not None:
            found[name] = (module.lora_a, module.lora_b)
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found[name.removeprefix("base_model.model.")] = peers.peft_adapter(module)
    return found


def training_step(inputs: StepInputs, model: nn.Module) -> Call:
    """A call that takes the next step and returns the loss and the clipped gradients."""
    parameters = [p for _, pair in sorted(adapters(model).items()) for p in pair]
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
    """The gradients by the tolerance rule, all of them as one vector; the loss nearly."""
    loss, exact_loss = tensors[0].double(), inputs.oracle[0].double()
    tolerance = 16 * torch.finfo(inputs.dtype).eps
    if not abs(loss - exact_loss) <= tolerance * abs(exact_loss):
        raise AssertionError(f"loss {loss:.7f}, the fp64 oracle has {exact_loss:.7f}")
    actual, plain, oracle = map(_all_gradients, (tensors, inputs.plain, inputs.oracle))
    assert_close_to_oracle(actual, plain, oracle, GRADIENT_FACTOR)


def _all_gradients(result: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in result[1:]])
