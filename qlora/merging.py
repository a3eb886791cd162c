"""Adapters merged into their base: dense layers, or again 4-bit ones, that answer as the adapted ones did."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora.adapter import AdapterHost, Start, is_converted
from qlora.experts import restore_experts
from qlora.lora_layer import LoRALayer
from qlora.model_parts import plain_name, rename_ties
from qlora.modules import QLoRALinear
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora.saved_modules import SavedModule

if TYPE_CHECKING:
    from qlora.originals import Original

_MUCH = 0.5  # of an adapter that is to be kept in 4 bits
_FAR = 0.7  # relative distance of a base from its original that no data type comes near


def merge(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    onto: nn.Module | str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Replace every converted layer, in place, by the dense layer with the adapters in use added in.

    W + scaling * B A is summed in fp32 over the dequantized W and rounded once. What an adapter trained whole
    takes its module's place. Parameters stay frozen.

    Args:
        model: a quantized or adapted model, or such a layer by itself.
        dtype: of the merged layers; by default what each had before it was quantized.
        onto: the original, which the model was quantized from, as a model or as its folder. Then W is the
            original's weight, which spares the error of quantization; but the adapter has learned over the
            quantized one, and with it to make up for this error. Of DoRA, rows are scaled as over the quantized
            weight, so that an untrained adapter gives the original. Refused for adapters that started by LoftQ or
            PiSSA, which hold a part of the original themselves.

    Returns:
        The model, or the dense layer where the model itself is such a layer.

    Raises:
        ValueError: there is nothing to merge, or `onto` does not fit by its layers, their shapes or, if it is in
            memory, their weights (nothing is changed then); or a layer of a folder has other weights, or a merged
            weight is not finite in its dtype: the model may be partly merged by then, of which the message tells,
            and must be loaded again.
    """
    layers = _layers(model)
    source = None if onto is None else _original(onto, layers)

    def dense(name: str, layer: LoRALayer) -> nn.Module:
        _, exact = _base_and_sum(name, layer, source)
        return _dense(name, layer, exact, dtype or layer.base_dtype)

    return restore_experts(_replace(model, dense, dtype))


@dataclass(frozen=True)
class Requantized:
    """What became of one layer.

    Attributes:
        name: the layer's.
        error: |Q - W| / |W|, of the weight in 4 bits and the exact merged one.
        adapter: |W - base| / |W|, of what the adapter had added.
        kept: how much of what the adapter had added is in the new 4-bit weight and was not in the old: 1 if all is
            on average, 0 if every weight was rounded back to where it was.
    """

    name: str
    error: float
    adapter: float
    kept: float


def requantize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    onto: nn.Module | str | os.PathLike[str] | None = None,
) -> list[Requantized]:
    """Quantize each adapted 4-bit layer anew with its adapters in use added in, in place; drop all adapters.

    The sum in fp32 is what is quantized. The base's values are 4-bit values already, and an adapter that moves them
    by less than half the way to the next is rounded away: `kept` shows it. Over the original weights (`onto`) that
    does not happen, as they lie anywhere in between. Adapted dense layers and modules trained whole are merged as
    `merge` does.

    Args:
        model: a quantized model.
        dtype: of what the layers dequantize to and of dense layers; by default what each had before.
        onto: as for `merge`: then it is the original's weight, with the adapter, that is quantized.

    Returns:
        A record for each layer that was quantized anew.

    Raises:
        ValueError: no 4-bit layer has an adapter in use, or as for `merge`.
    """
    layers = _layers(model)
    if not any(isinstance(layer, QLoRALinear) and layer.active for layer in layers.values()):
        raise ValueError("model must hold 4-bit layers with an adapter in use; it has none")
    source = None if onto is None else _original(onto, layers)
    done: list[Requantized] = []

    def again(name: str, layer: LoRALayer) -> nn.Module:
        base, exact = _base_and_sum(name, layer, source)
        if not isinstance(layer, QLoRALinear):
            return _dense(name, layer, exact, dtype or layer.base_dtype)
        if layer.active:
            quantized = quantize_4bit(exact, **layer.weight.settings)
            done.append(_compare(name, exact, base, layer.base_weight(), quantized))
        else:  # as it was, to the last bit
            quantized = layer.weight
        for adapter in list(layer.adapters):
            layer.remove(adapter)
        layer.start = Start()  # no adapter is left that it was made for
        layer.weight = replace(quantized, dtype=dtype or layer.base_dtype)
        return layer

    restore_experts(_replace(model, again, dtype))
    kept = sum(layer.kept for layer in done) / len(done)
    if kept < _MUCH:
        warnings.warn(
            f"4 bits keep {kept:.0%} of what the adapter had added: it moves the weights by less than the steps "
            "between 4-bit values. Quantize the sum with the original weights instead (onto; --onto-original)",
            stacklevel=2,
        )
    return done


def _compare(
    name: str, exact: Tensor, base: Tensor | None, before: Tensor, quantized: QuantizedTensor
) -> Requantized:
    after = dequantize_4bit(quantized, torch.float32)
    added = exact - (before if base is None else base)
    kept = ((after - before) * added).sum() / added.square().sum()
    return Requantized(
        name, _share(after - exact, exact), _share(added, exact), kept.nan_to_num(0.0).item()
    )


def _share(part: Tensor, whole: Tensor) -> float:
    """|part| / |whole|, and 0 where both are zero."""
    return (part.norm() / whole.norm()).nan_to_num(0.0).item()


def _layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The converted layers by name; one in two places comes twice."""
    if not is_converted(model):
        raise ValueError("model must hold QLoRA layers to merge; it has none")
    modules = model.named_modules(remove_duplicate=False)
    return {plain_name(name): module for name, module in modules if isinstance(module, LoRALayer)}


def _replace(
    model: nn.Module,
    convert: Callable[[str, LoRALayer], nn.Module],
    dtype: torch.dtype | None,
) -> nn.Module:
    """Put what `convert` makes of each layer in its place, and trained copies in that of saved modules."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, AdapterHost):
            continue
        if module not in made:
            made[module] = _made(name, module, convert, dtype, is_first=not made)
        if module is model:
            return made[module]
        model.set_submodule(name, made[module])
        if isinstance(module, SavedModule):
            rename_ties(model, f"{plain_name(name)}.original", plain_name(name))
    _say_untied(model)
    return model


def _made(
    name: str,
    host: AdapterHost,
    convert: Callable[[str, LoRALayer], nn.Module],
    dtype: torch.dtype | None,
    is_first: bool,
) -> nn.Module:
    if not isinstance(host, LoRALayer):
        return _trained(host, dtype)
    try:
        return convert(plain_name(name), host)
    except ValueError as error:
        if is_first:
            raise
        raise ValueError(f"{error} (the model is partly merged by now: load it again)") from error


def _trained(saved: SavedModule, dtype: torch.dtype | None) -> nn.Module:
    """The copy that the adapter in use has trained, or the original, in the dtypes of the original or in `dtype`."""
    module = next((saved.adapters[name] for name in saved.active), saved.original)
    pairs = zip(module.parameters(), saved.original.parameters(), strict=True)
    for parameter, original in pairs:
        parameter.data = parameter.data.to(dtype or original.dtype)
    return module.requires_grad_(False)


def _say_untied(model: nn.Module) -> None:
    """Where input and output embeddings are one no longer, say so in the config, by which they are tied on loading."""
    if not hasattr(model, "get_output_embeddings"):
        return
    try:
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a model of speech has no input embeddings
        return
    if outputs is None or inputs is None or inputs.weight is outputs.weight:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _original(
    onto: nn.Module | str | os.PathLike[str], layers: Mapping[str, LoRALayer]
) -> Mapping[str, Original]:
    """The original weights of a model's layers by name, when it is clear that they are those."""
    from qlora import originals  # which imports a good part of the library

    _check_starts(layers.items())
    if isinstance(onto, nn.Module):
        found = originals.of_model(onto)
    else:
        found = originals.of_folder(Path(onto))
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        given = found.get(name)
        if given is None:
            raise ValueError(
                f"onto must be what the model was quantized from; it has no linear layer {name}"
            )
        if given.shape != shape:
            raise ValueError(
                f"onto must be what the model was quantized from; {name} must have shape {shape}, "
                f"and has {given.shape}"
            )
    if isinstance(onto, nn.Module):  # a folder's are looked at as they are read
        for name, layer in layers.items():
            _read(name, layer, found)
    return found


def _check_starts(layers: Iterable[tuple[str, LoRALayer]]) -> None:
    for name, layer in layers:
        used = [layer.adapters[adapter] for adapter in layer.active]
        for start in (layer.start, *(adapter.start for adapter in used)):
            if start.init != "lora":
                raise ValueError(
                    f"onto must be None after init={start.init!r}, where the adapter holds a part of the original "
                    f"weights ({name}); merge without it"
                )


def _base_and_sum(
    name: str, layer: LoRALayer, source: Mapping[str, Original] | None
) -> tuple[Tensor | None, Tensor]:
    """The original weight, if there is a source of it, and the merged one over it or else over the layer's own."""
    base = None if source is None else _read(name, layer, source)
    return base, layer.merged_weight(base)


def _read(name: str, layer: LoRALayer, source: Mapping[str, Original]) -> Tensor:
    """The original weight [n, k] in fp32, where the layer is."""
    base = layer.base_weight()
    weight = source[name].read().detach().to(base.device, torch.float32)
    if (weight - base).norm() > _FAR * weight.norm():
        raise ValueError(
            f"onto must be what the model was quantized from; {name} has other weights than that"
        )
    return weight


def _dense(name: str, layer: LoRALayer, exact: Tensor, dtype: torch.dtype) -> nn.Module:
    weight = exact.to(dtype)
    if not torch.isfinite(weight).all():
        hint = (
            "; merge to bfloat16, which has float32's range" if torch.isfinite(exact).all() else ""
        )
        raise ValueError(f"{name or 'model'}: the merged weight is not finite in {dtype}{hint}")
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    with torch.device("meta"):  # no memory and no time for values that are replaced at once
        if layer.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            dense, weight = Conv1D(layer.out_features, layer.in_features), weight.mT.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense.train(layer.training)
