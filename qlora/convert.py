"""`quantize_model`: replace the linear layers of any model by quantized ones with adapters, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qlora.config import ALL_LINEAR, QLoRAConfig
from qlora.modules import LoRALayer, LoRALinear, QLoRALinear, is_conv1d
from qlora.quantized import QuantizedTensor

_NOTABLE = 0.03  # a part of all parameters that is worth a row of the report
_SHOWN = 4


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did; `print` it.

    Attributes:
        quantized: names of the layers that hold 4-bit weights now.
        adapted: names of the layers that got an adapter.
        left_alone: names of the linear layers that stay as they were (output embeddings, tied weights).
        quantized_parameters: weights held in 4 bits.
        dense_parameters: all other frozen parameters: embeddings, norms, biases, and whatever is no linear
            layer (experts held as one 3-D parameter, say).
        other_dense: of those the matrices that belong to no embedding and no linear layer, by name, with `*`
            for the numbers of layers, and how many weights go by that name; the most first.
        quantized_bytes: the bytes that these weights and their scales take.
        trainable_parameters: the adapters' parameters.
        bytes_before, bytes_after: all parameters and buffers of the model, adapters included.
    """

    quantized: tuple[str, ...]
    adapted: tuple[str, ...]
    left_alone: tuple[str, ...]
    quantized_parameters: int
    dense_parameters: int
    other_dense: tuple[tuple[str, int], ...]
    quantized_bytes: int
    trainable_parameters: int
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_parameter(self) -> float:
        """Mean over the quantized weights; 0 if there are none."""
        return 8 * self.quantized_bytes / max(self.quantized_parameters, 1)

    def __str__(self) -> str:
        rows = [
            ("quantized layers", f"{len(self.quantized):,}"),
            ("quantized parameters", f"{self.quantized_parameters:,}"),
            ("parameters left dense", f"{self.dense_parameters:,}"),
            ("bits per parameter", f"{self.bits_per_parameter:.3f}"),
            *self._adapter_rows(),
            ("linear layers left alone", ", ".join(self.left_alone) or "none"),
            *([("not linear, left dense", self.notable_dense)] if self.notable_dense else []),
            ("bytes before", _bytes(self.bytes_before)),
            ("bytes after", _bytes(self.bytes_after)),
        ]
        return "\n".join(f"{name:<26}{value}" for name, value in rows)

    def _adapter_rows(self) -> list[tuple[str, str]]:
        if not self.adapted:  # a base by itself
            return []
        return [
            ("layers with an adapter", f"{len(self.adapted):,}"),
            ("trainable parameters", f"{self.trainable_parameters:,}"),
        ]

    @property
    def notable_dense(self) -> str:
        """The parts of `other_dense`, in words, if they are a good part of the model; else ""."""
        total = self.quantized_parameters + self.dense_parameters
        if sum(count for _, count in self.other_dense) < _NOTABLE * total:
            return ""
        parts = [f"{name} ({count:,}, {count / total:.0%})" for name, count in self.other_dense]
        return ", ".join(parts[:_SHOWN] + (["..."] if len(parts) > _SHOWN else []))


def _bytes(count: int) -> str:
    return f"{count:,} ({count / 2**20:,.1f} MiB)"


def quantize_model(model: nn.Module, config: QLoRAConfig | None = None) -> QuantizationReport:
    """Quantize every linear layer of a model in place, add adapters, and freeze all the rest.

    Converts `nn.Linear` itself (not its subclasses, which mean something else by their weight) and transformers'
    Conv1D. Embeddings, norms, the output embedding (`lm_head`) and any layer whose weight is tied to an
    embedding stay as they are. `config.target_modules` chooses the layers that get an adapter; with
    `config.format=None` only these are touched, and their base stays dense.

    Args:
        model: any module; on the meta device only the sizes are worked out.
        config: `QLoRAConfig()` by default.

    Returns:
        A report of what was done.

    Raises:
        ValueError: a part of `target_modules` matches no layer, the model has been converted already, or a weight
            is not finite; the message names the layer. The model is unchanged then.
    """
    config = config or QLoRAConfig()
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise ValueError("model must contain its linear layers; for one layer use from_linear")
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError("model must not have been converted before; it holds LoRA layers already")
    bytes_before = _model_bytes(model)
    linears, left_alone = _find_linears(model)
    adapted = _choose(config.target_modules, linears)
    chosen = adapted if config.format is None else list(linears)
    replacements = _replacements(linears, chosen, frozenset(adapted), config)
    model.requires_grad_(False)
    for name, layer in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    _avoid_fast_paths(model)
    return _report(model, replacements, left_alone, bytes_before)


def _find_linears(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """The layers to convert by name (a module in two places comes twice), and the ones to leave alone."""
    kept_weights = {id(weight) for weight in _embedding_weights(model)}
    linears, left_alone = {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        if id(module.weight) in kept_weights or not (
            type(module) is nn.Linear or is_conv1d(module)
        ):
            left_alone.append(name)
        else:
            linears[name] = module
    return linears, left_alone


def _embedding_weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights of input embeddings, and of the output embeddings of every transformers model inside."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):  # a ModuleList where a model has several heads
            yield from (part.weight for part in head.modules() if hasattr(part, "weight"))


def _choose(target_modules: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that `target_modules` means, of which each part must mean at least one."""
    if target_modules == ALL_LINEAR:
        return _at_least_one(list(names), target_modules, names)
    if isinstance(target_modules, str):
        pattern = _compile(target_modules)
        matching = [name for name in names if pattern.fullmatch(name)]
        return _at_least_one(matching, target_modules, names)
    chosen: set[str] = set()
    for target in target_modules:
        matching = [name for name in names if f".{name}".endswith(f".{target}")]
        chosen.update(_at_least_one(matching, target, names))
    return [name for name in names if name in chosen]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"target_modules must be 'all-linear', names or a regular expression;"
            f" got {pattern!r} ({error})"
        ) from error


def _at_least_one(matching: list[str], target: str, names: Iterable[str]) -> list[str]:
    if not matching:
        raise ValueError(
            f"target_modules must match a linear layer; {target!r} matches none of {_some(names)}"
        )
    return matching


def _some(names: Iterable[str], count: int = 8) -> str:
    """The distinct last parts of the names, a few of them."""
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return (
        ", ".join(parts[:count]) + (", ..." if len(parts) > count else "") or "(no linear layers)"
    )


def _replacements(
    linears: dict[str, nn.Module], chosen: list[str], adapted: frozenset[str], config: QLoRAConfig
) -> dict[str, LoRALayer]:
    """New layers by name. A module in several places is replaced by one, a tied weight quantized once."""
    by_module: dict[int, LoRALayer] = {}
    by_weight: dict[tuple[int, bool], QuantizedTensor] = {}
    replacements = {}
    for name in chosen:
        linear = linears[name]
        weight_key = id(linear.weight), is_conv1d(linear)
        if id(linear) not in by_module:
            try:
                layer = _convert(linear, config, name in adapted, by_weight.get(weight_key))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
            by_module[id(linear)] = layer.train(linear.training)
            by_weight[weight_key] = layer.weight
        replacements[name] = by_module[id(linear)]
    return replacements


def _convert(
    linear: nn.Module, config: QLoRAConfig, adapter: bool, quantized: QuantizedTensor | None
) -> LoRALayer:
    if config.format is None:
        return LoRALinear.from_linear(linear, config, adapter)
    return QLoRALinear.from_linear(linear, config, adapter, quantized)


def _avoid_fast_paths(model: nn.Module) -> None:
    """In inference torch's encoder layers would read `linear.weight` themselves, and miss the adapter."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _model_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {id(t): t for group in (model.parameters(), model.buffers()) for t in group}
    return sum(tensor.nbytes for tensor in tensors.values())


def _report(
    model: nn.Module, layers: dict[str, LoRALayer], left_alone: list[str], bytes_before: int
) -> QuantizationReport:
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QLoRALinear)}
    weights = {id(layer.packed): layer.weight for layer in quantized.values()}
    return QuantizationReport(
        quantized=tuple(quantized),
        adapted=tuple(name for name, layer in layers.items() if layer.lora_a is not None),
        left_alone=tuple(left_alone),
        quantized_parameters=sum(weight.numel for weight in weights.values()),
        dense_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        other_dense=_other_dense(model),
        quantized_bytes=sum(weight.nbytes for weight in weights.values()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        bytes_before=bytes_before,
        bytes_after=_model_bytes(model),
    )


def _other_dense(model: nn.Module) -> tuple[tuple[str, int], ...]:
    """See `QuantizationReport.other_dense`."""
    known = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.Linear, LoRALayer)) or is_conv1d(module)
        for parameter in module.parameters(recurse=False)
    }
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in known:
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            counts[pattern] = counts.get(pattern, 0) + parameter.numel()
    return tuple(sorted(counts.items(), key=lambda item: -item[1]))
