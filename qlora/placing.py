"""Where a file's tensors go in a model that was converted on the meta device, and what adapters need then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from qlora import starts
from qlora.adapter import DEFAULT, Adapter, AdapterHost
from qlora.config import QLoRAConfig
from qlora.experts import QLoRAExperts
from qlora.lora_layer import LoRALayer
from qlora.modules import QLoRALinear
from qlora.quantized import QuantizedTensor, dtype_name
from qlora.saved_modules import SavedModule


def start_adapters(model: nn.Module, device: torch.device) -> None:
    """Give adapters on the meta device their first values, drawn on the CPU as a dense model's are."""
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            for adapter in layer.adapters.values():
                adapter.to_empty(device="cpu")
                adapter.reset()
                adapter.to(device)


def settle_adapters(model: nn.Module) -> None:
    """Give DoRA adapters what they take from the base weights, when these are in place."""
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer.base_changed()
            for name in layer.adapters:
                layer.reset_magnitude(name)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, the parameters and buffers themselves, by the names of the plain model."""
    hosts = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterHost)
    }
    is_saved = {name: isinstance(module, SavedModule) for name, module in hosts.items()}
    stops = {f"{name}.weight" for name, m in hosts.items() if isinstance(m, QLoRALinear)}
    tensors = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        host, found, _ = key.partition(".adapters.")
        if (found and host in is_saved) or key in stops:
            continue
        host, _, rest = key.partition(".original.")
        tensors[f"{host}.{rest}" if is_saved.get(host) else key] = tensor
    return tensors


def put(
    model: nn.Module,
    names: Iterable[str],
    tensor: Tensor | QuantizedTensor,
    own_dtype: torch.dtype,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put a file's tensor into the model under all names that share it, quantized where the layer is.

    Args:
        names: of the plain model; what an adapter trains whole gets a copy as well.
        tensor: in 4 bits already only for layers that are.
        own_dtype: the plain model's for this tensor, to which it is cast before anything else.
        device: where it is quantized, and stays.
        dtype: what parameters that stay dense are cast to, if any; buffers keep their own dtype.
    """
    if isinstance(tensor, QuantizedTensor):
        weight = tensor.to(device)
        for name in names:
            for module, _ in _owners(model, name):
                module.weight = weight
        return
    value = _Value(tensor, tensor.to(device).to(own_dtype), dtype)
    for name in names:
        attribute = name.rpartition(".")[2]
        for module, trained in _owners(model, name):
            if isinstance(module, QLoRAExperts):
                for part, stacked in module.split(attribute, tensor).items():
                    put(module, [part], stacked, own_dtype, device, dtype)
            elif trained and attribute in module._parameters:
                setattr(
                    module,
                    attribute,
                    nn.Parameter(value.dense.to(getattr(module, attribute).dtype, copy=True)),
                )
            elif attribute in module._buffers:
                setattr(module, attribute, value.dense.clone() if trained else value.buffer)
            elif isinstance(module, LoRALayer) and attribute == "weight":
                module.weight = value.of_layer(module)
            else:
                setattr(module, attribute, value.parameter)


class _Value:
    """A file's tensor in the forms in which the places for it take it, each made once and shared."""

    def __init__(self, mapped: Tensor, dense: Tensor, dtype: torch.dtype | None) -> None:
        self.mapped, self.dense, self.dtype = mapped, dense, dtype
        self._quantized: dict[bool, QuantizedTensor] = {}

    @cached_property
    def buffer(self) -> Tensor:
        return self._own(self.dense)

    @cached_property
    def parameter(self) -> nn.Parameter:
        return nn.Parameter(self._own(self._cast(self.dense)), requires_grad=False)

    def of_layer(self, layer: LoRALayer) -> nn.Parameter | QuantizedTensor:
        """The weight [n, k] of a layer, quantized as it is; an adapter that starts from the weight does."""
        turned = layer.fan_in_fan_out
        weight = self.dense.mT if turned else self.dense
        if isinstance(layer, QLoRALinear):
            if turned not in self._quantized or layer.start.init != "lora":
                self._quantized[turned], factors = starts.quantize_and_start(
                    weight, *_settings(layer)
                )
                _start(layer, factors)
            return self._quantized[turned]
        changed, factors = starts.split(weight, *_settings(layer))
        if factors is not None:
            _start(layer, factors)
            return nn.Parameter(self._cast(changed), requires_grad=False)
        return nn.Parameter(self.parameter.mT, requires_grad=False) if turned else self.parameter

    def _cast(self, value: Tensor) -> Tensor:
        is_cast = value.is_floating_point() and self.dtype is not None
        return value.to(self.dtype) if is_cast else value

    def _own(self, value: Tensor) -> Tensor:
        """In memory of its own, not in the file's map."""
        return value.clone() if value.data_ptr() == self.mapped.data_ptr() else value


def _first_adapter(layer: LoRALayer) -> Adapter | None:
    """The adapter that the base was made for, if it starts from the weight."""
    return layer.adapters[DEFAULT] if layer.start.init != "lora" else None


def _settings(layer: LoRALayer) -> tuple[QLoRAConfig, int, float]:
    """How a layer without values is to be quantized, as `starts` takes it."""
    adapter = _first_adapter(layer)
    base = layer.weight.settings if isinstance(layer, QLoRALinear) else {}
    if adapter is None:
        return QLoRAConfig(**base), 0, 1.0
    config = QLoRAConfig(
        **base,
        adapter_dtype=dtype_name(adapter.lora_a.dtype),
        init=layer.start.init,
        init_iterations=layer.start.iterations,
    )
    return config, adapter.rank, adapter.scaling


def _start(layer: LoRALayer, factors: tuple[Tensor, Tensor] | None) -> None:
    if factors is not None:
        _first_adapter(layer).fill(*factors)


def _owners(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, bool]]:
    """The modules with what the plain model calls `name`, each with whether it is a copy that an adapter trains."""
    found: list[tuple[nn.Module, bool]] = [(model, False)]
    for part in name.split(".")[:-1]:
        inner = [(getattr(module, part), trained) for module, trained in found]
        found = [pair for module, trained in inner for pair in _inside(module, trained)]
    return iter(found)


def _inside(module: nn.Module, trained: bool) -> Iterator[tuple[nn.Module, bool]]:
    if not isinstance(module, SavedModule):
        yield module, trained
        return
    yield module.original, False
    for copy in module.adapters.values():
        yield copy, True
