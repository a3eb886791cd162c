"""A Llama in the forms that contenders train it in, with LoRA or DoRA: ours, PEFT's over bitsandbytes, and dense ones.

All start from the same adapter over the same weights: what NF4 with double quantization makes of the model.
The dense ones hold that decoded, the 4-bit ones as the same bytes, so that one oracle serves all.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import qlora
from benchmarks import peers
from qlora.modules import LoRALayer, QLoRALinear
from qlora.quantized import dequantize_4bit
from qlora.testing import GRADIENT_FACTOR, assert_close_to_oracle

ALPHA = 16.0
OURS = "qlora NF4+DQ"
DENSE = "LoRA over dense"
PEFT_DENSE = "PEFT over dense"
PEFT_BITSANDBYTES = "PEFT over bitsandbytes NF4+DQ"


class Trained:
    """A model and its adapters.

    Attributes:
        ours: the model with our 4-bit layers, trained in place.
        dtype: of the weights that are not quantized, and of what is computed.
        dora: whether the adapters are DoRA.
    """

    def __init__(
        self,
        base: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        dora: bool = False,
    ) -> None:
        self.device, self.dtype, self.rank, self.dora = device, dtype, rank, dora
        self._base = base.to(device, dtype).train()
        self.ours = self.base()
        qlora.quantize_model(self.ours, self._config("nf4"))
        for name, layer in self.ours.named_modules():
            if isinstance(layer, QLoRALinear):
                layer.lora_b.data.normal_(std=0.02)  # zeros would hide what is wrong with A
                self._base.get_submodule(name).weight.data = dequantize_4bit(layer.weight)
        self._adapters = {
            name: [t.detach().clone() for t in parts] for name, parts in adapters(self.ours).items()
        }

    def _config(self, format: str | None) -> qlora.QLoRAConfig:
        return qlora.QLoRAConfig(rank=self.rank, alpha=ALPHA, format=format, dora=self.dora)

    def base(self) -> nn.Module:
        """A model of its own that shares the tensors of the base."""
        shared = itertools.chain(self._base.parameters(), self._base.buffers())
        return copy.deepcopy(self._base, {id(tensor): tensor for tensor in shared})

    def dense(self) -> nn.Module:
        """Plain LoRA over the dense base: our module, PyTorch's operations."""
        model = self.base()
        qlora.quantize_model(model, self._config(None))
        return self._with_adapters(model)

    def exact(self) -> nn.Module:
        """The same in fp64, the lengths of rows included, which a cast leaves in fp32."""
        model = copy.deepcopy(self.dense()).double()
        for layer in model.modules():
            if isinstance(layer, LoRALayer) and layer.row_squares is not None:
                layer.row_squares = layer.weight.square().sum(1)
        return model

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
        """The model with PEFT's adapters on the layers on which ours has its own."""
        wrapped = peers.peft_model(model, self.rank, ALPHA, "all-linear", dora=self.dora)
        return self._with_adapters(wrapped)

    def _with_adapters(self, model: nn.Module) -> nn.Module:
        own = adapters(model)
        if own.keys() != self._adapters.keys():
            raise AssertionError(f"has adapters on {len(own)} layers, not on {len(self._adapters)}")
        for name, parts in own.items():
            for parameter, initial in zip(parts, self._adapters[name], strict=True):
                parameter.data = initial.to(parameter.device, parameter.dtype, copy=True)
        return model


def adapters(model: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """A, B and DoRA's magnitude of ours or of PEFT's, by the name that the layer had in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.adapter is not None:
            found[name] = tuple(part for part in module.adapter() if part is not None)
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            found[name.removeprefix("base_model.model.")] = peers.peft_adapter(module)
    return found


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All of `adapters`, in one order for every form of the model."""
    return [parameter for _, parts in sorted(adapters(model).items()) for parameter in parts]


def check_gradients(
    gradients: Sequence[Tensor], plain: Sequence[Tensor], oracle: Sequence[Tensor]
) -> None:
    """By the tolerance rule: those of all factors as one vector, those of all magnitudes as another."""
    for dimensions in (2, 1):
        vectors = [
            torch.cat([some[0].new_empty(0), *(g.flatten() for g in some if g.dim() == dimensions)])
            for some in (gradients, plain, oracle)
        ]
        assert_close_to_oracle(*vectors, GRADIENT_FACTOR)
