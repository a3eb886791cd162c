"""`quantize_model`: replace the linear layers of any model by quantized ones with adapters, in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

import torch
from torch import nn

from qlora.adapter import DEFAULT, is_converted
from qlora.config import QLoRAConfig
from qlora.experts import ExpertLinear, is_experts, place_experts, with_siblings
from qlora.lora_layer import LoRALayer
from qlora.model_parts import is_conv1d
from qlora.modules import LoRALinear, QLoRALinear
from qlora.quantized import QuantizedTensor
from qlora.report import QuantizationReport, model_bytes, report
from qlora.saved_modules import as_saved_module
from qlora.targets import check_no_experts, choose_layers, find_linears, saved_names


def quantize_model(
    model: nn.Module, config: QLoRAConfig | None = None, layers: Collection[str] | None = None
) -> QuantizationReport:
    """Quantize every linear layer of a model in place, add adapters, and freeze all the rest.

    Converts `nn.Linear` itself (not its subclasses, which mean something else by their weight), transformers' Conv1D,
    and each expert of transformers' stacked ones (see `qlora.experts`). Embeddings, norms, the output embedding
    (`lm_head`) and any layer whose weight is tied to an embedding stay as they are, unless `config.target_modules`,
    which chooses the layers that get an adapter, names them: then they get one over their dense weight. With
    `config.format=None` only layers with an adapter are touched, and their base stays dense. Modules in
    `config.modules_to_save` are neither quantized nor adapted.

    Args:
        model: any module; on the meta device only the sizes are worked out.
        config: `QLoRAConfig()` by default.
        layers: names of the layers to hold in 4 bits, if not those named above; the rest stay dense, and get an
            adapter as they would otherwise.

    Returns:
        A report of what was done.

    Raises:
        ValueError: a part of `target_modules` matches no layer, the model has been converted already, or a weight
            is not finite; the message names the layer. The model is unchanged then.
    """
    config = config or QLoRAConfig()
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise ValueError("model must contain its linear layers; for one layer use from_linear")
    if is_experts(model):
        raise ValueError("model must contain its experts; got a module of experts by itself")
    if is_converted(model):
        raise ValueError("model must not have been converted before; it holds LoRA layers already")
    bytes_before = model_bytes(model)
    saved = saved_names(model, config.modules_to_save)
    linears, heads, left_alone = find_linears(model, saved)
    found = linears | heads
    in_4bit = _to_quantize(config, linears, found, layers)
    adapted = choose_layers(config.target_modules, linears, heads)
    if config.dora:
        check_no_experts(name for name in adapted if isinstance(found[name], ExpertLinear))
    replacements = _replacements(found, in_4bit, frozenset(adapted), config)
    model.requires_grad_(False)
    place_experts(model, replacements)
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    _train_whole(model, saved, config.adapter_torch_dtype)
    _avoid_fast_paths(model)
    left_alone = [name for name in [*linears, *left_alone] if name not in replacements]
    return report(model, replacements, left_alone, bytes_before)


def _to_quantize(
    config: QLoRAConfig,
    linears: Collection[str],
    found: Collection[str],
    layers: Collection[str] | None,
) -> frozenset[str]:
    if config.format is None:
        return frozenset()
    if layers is None:
        return frozenset(linears)
    if unknown := sorted(set(layers) - set(found)):
        raise ValueError(f"layers must name linear layers of the model; got {unknown[0]!r}")
    return frozenset(layers)


def _train_whole(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> None:
    """Give the new adapter a copy of its own of each of these modules."""
    for name in names:
        module = as_saved_module(model, name)
        module.add(DEFAULT, dtype=dtype)
        module.choose({DEFAULT: 1.0})


def _replacements(
    linears: Mapping[str, nn.Module], in_4bit: Set[str], adapted: Set[str], config: QLoRAConfig
) -> dict[str, LoRALayer]:
    """New layers by name. A module in several places is replaced by one, a tied weight quantized once."""
    by_module: dict[int, LoRALayer] = {}
    by_weight: dict[tuple[int, bool], QuantizedTensor] = {}
    replacements = {}
    wanted = with_siblings(in_4bit | adapted, linears)
    for name, linear in linears.items():
        if name not in wanted:
            continue
        weight_key = id(linear.weight), is_conv1d(linear)
        if id(linear) not in by_module:
            pattern_name = name.rpartition(".")[0] if isinstance(linear, ExpertLinear) else name
            options = {"adapter": name in adapted, "name": pattern_name}
            try:
                if name not in in_4bit:
                    layer = LoRALinear.from_linear(linear, config, **options)
                else:
                    known = by_weight.get(weight_key) if config.init == "lora" else None
                    layer = QLoRALinear.from_linear(linear, config, quantized=known, **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            by_module[id(linear)] = layer.train(linear.training)
            if isinstance(layer, QLoRALinear):
                by_weight[weight_key] = layer.weight
        replacements[name] = by_module[id(linear)]
    return replacements


def _avoid_fast_paths(model: nn.Module) -> None:
    """In inference torch's encoder layers would read `linear.weight` themselves, and miss the adapter."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
