"""PEFT's adapter files: adapter_config.json and the names in adapter_model.safetensors, both ways.

What PEFT can do and we cannot is refused by the name of its setting.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora import files, peft_experts
from qlora.config import QLoRAConfig
from qlora.lora_layer import LoRALayer
from qlora.model_parts import plain_name
from qlora.targets import is_expert, pattern_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_KEY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BROUGHT = ".base_layer.weight"

# Fields of adapter_config.json that only some values are allowed for. What pissa, loftq and others
# of that kind start from is a changed base weight, which the adapter's file does not hold.
_ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Fields that we read, or that do not change what a trained adapter computes. Any other field must
# be empty: it switches on a variant of LoRA.
_KNOWN_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core"),
    *("eva_config", "loftq_config", "qalora_group_size", "ensure_weight_tying"),
}


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter's folder holds.

    Attributes:
        settings: rank, alpha and so on; what they say of the base and of target_modules does not count.
        target_parameters: stacks of experts, as PEFT names them.
        layers: the tensors of each adapted layer, by `lora_a`, `lora_b` and, for DoRA, `magnitude`.
        saved: the state dict of each module that was trained as a whole.
        brought: base weights that PEFT put beside the adapter, by the module's name.
    """

    settings: QLoRAConfig
    target_parameters: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Tensor]]
    saved: Mapping[str, Mapping[str, Tensor]]
    brought: Mapping[str, Tensor]


def read(folder: Path, stacks: Mapping[str, int] | None = None) -> StoredAdapter:
    """The adapter in a folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        stacks: of the model that it is for, see `experts.stack_sizes`; without, experts are left out.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or asks for what is not supported.
    """
    settings, parameters, ties = _read_settings(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.exists() and (pickled := folder / _PICKLED).exists():
        raise FileNotFoundError(
            f"{path}: no such file; {pickled.name}, which old versions of PEFT wrote, is a pickle and is not "
            "read: load it with PEFT and save it again"
        )
    tensors = {key.removeprefix(_PREFIX): value for key, value in files.read_tensors(path).items()}
    layers: dict[str, dict[str, Tensor]] = {}
    if parameters:
        try:
            experts = {} if stacks is None else peft_experts.unstack(tensors, parameters, stacks)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        layers |= {
            name: dict(zip(("lora_a", "lora_b"), ab, strict=True)) for name, ab in experts.items()
        }
        tensors = _without_stacks(tensors, parameters)
    ours = {theirs: own for own, theirs in _FACTORS.items()}
    saved: dict[str, dict[str, Tensor]] = {}
    brought: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if found := _KEY.fullmatch(key):
            layers.setdefault(found[1], {})[ours[found[2]]] = value
        elif module := _saved_module(key, settings.modules_to_save):
            saved.setdefault(module, {})[key.removeprefix(f"{module}.")] = value
        else:
            brought[key.removesuffix(_BROUGHT).removesuffix(".weight")] = value
    if ties and saved and brought:
        raise ValueError(
            f"{folder / CONFIG}: ensure_weight_tying = True is not supported with modules_to_save, where it ties "
            f"{', '.join(sorted(brought))} to what is trained: train without it, and without a tied module among "
            "modules_to_save or with all of them"
        )
    _check_complete(path, settings, layers, stacks or {})
    return StoredAdapter(settings, parameters, layers, saved, brought)


def key_of(layer: str, factor: str) -> str:
    """The key of a layer's tensor in the file, for errors."""
    return f"{_PREFIX}{layer}.{_FACTORS.get(factor, factor)}"


def _read_settings(path: Path) -> tuple[QLoRAConfig, tuple[str, ...], bool]:
    """The adapter's settings, `target_parameters`, `ensure_weight_tying`; an error names what is not supported."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; an adapter is a folder with {CONFIG} and {WEIGHTS}"
        )
    config = files.read_json(path)
    for name, value in config.items():
        allowed = _ALLOWED_VALUES.get(name)
        if (value not in allowed) if allowed else (value and name not in _KNOWN_FIELDS):
            raise ValueError(f"{path}: {name} = {value!r} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be an integer of at least 1; got {rank!r}")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{path}: {name} must be a finite number; got {value!r}")
    try:
        settings = QLoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            modules_to_save=tuple(config.get("modules_to_save") or ()),
        )
        parameters = tuple(config.get("target_parameters") or ())
        return settings, parameters, bool(config.get("ensure_weight_tying"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _without_stacks(tensors: Mapping[str, Tensor], parameters: Iterable[str]) -> dict[str, Tensor]:
    """Without the tensors of experts, whose keys name the module that holds the parameter."""
    ends = tuple(f".{name.rpartition('.')[0] or 'experts'}" for name in parameters)
    kept = {}
    for key, value in tensors.items():
        module = key.partition(".lora_")[0]
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        if ".lora_" not in key or not f".{module}".endswith(ends):
            kept[key] = value
    return kept


def _saved_module(key: str, modules_to_save: Iterable[str]) -> str | None:
    """The module of those trained whole that a key belongs to."""
    parts = key.split(".")
    for i in range(1, len(parts)):  # the outermost: what is within it is a part of it
        module = ".".join(parts[:i])
        if module.endswith(tuple(modules_to_save)):  # PEFT's rule, within a word as well
            return module
    return None


def _check_complete(
    path: Path,
    settings: QLoRAConfig,
    layers: Mapping[str, Mapping[str, Tensor]],
    stacks: Mapping[str, int],
) -> None:
    """Whether each layer has all its tensors, of the rank that the config says, and finite."""
    for name, given in layers.items():
        expected = ("lora_a", "lora_b", "magnitude") if settings.dora else ("lora_a", "lora_b")
        for factor in expected:
            if factor not in given:
                raise ValueError(f"{path}: {key_of(name, factor)} is missing")
        if extra := given.keys() - set(expected):
            raise ValueError(f"{path}: {key_of(name, *extra)} is not expected: use_dora is not set")
        for factor, value in given.items():
            if value.dim() != (1 if factor == "magnitude" else 2):
                raise ValueError(
                    f"{path}: {key_of(name, factor)} has shape {tuple(value.shape)}; only linear "
                    "layers are supported"
                )
            if value.dtype not in _DTYPES:
                raise ValueError(f"{path}: {key_of(name, factor)} must be float; got {value.dtype}")
            if not value.isfinite().all():
                raise ValueError(f"{path}: {key_of(name, factor)} holds NaN or infinite values")
        ranks = given["lora_a"].shape[0], given["lora_b"].shape[1]
        rank = settings.rank_of(pattern_name(name, stacks))
        if ranks != (rank, rank):
            found = " and ".join(map(str, dict.fromkeys(ranks)))
            raise ValueError(
                f"{path}: {name} must have rank {rank}, as {CONFIG} says; its tensors have {found}"
            )


# --- Writing ----------------------------------------------------------------------------------------


def config_to_write(
    model: nn.Module,
    settings: QLoRAConfig,
    layers: Mapping[str, LoRALayer],
    stacks: Mapping[str, int],
) -> dict[str, Any]:
    """What adapter_config.json says of an adapter.

    Args:
        model: that it is a part of.
        settings: see `adapter_settings.adapter_config`.
        layers: those that have it, by name.
        stacks: see `read`.
    """
    stacked = peft_experts.stacked_names(layers, stacks)
    if stacked and settings.dora:
        raise ValueError(
            f"dora must be False for experts ({stacked[0]}): PEFT's files have no place for it"
        )
    plain = [name for name in layers if not is_expert(name, stacks)]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": settings.rank,
        "rank_pattern": dict(settings.rank_pattern),
        "lora_alpha": settings.alpha,
        "alpha_pattern": dict(settings.alpha_pattern),
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "lora_dropout": 0.0 if stacked else settings.dropout,  # PEFT allows no other with experts
        "target_modules": _target_modules(model, plain),
        **({"target_parameters": stacked} if stacked else {}),
        "modules_to_save": list(settings.modules_to_save) or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
    }


def _task_type(model: nn.Module) -> str | None:
    """What PEFT's AutoPeftModel... classes look for."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _target_modules(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """The last parts of the names (q_proj, ...) where these single out the layers, else all names.

    A regular expression where the end of another layer's name is one of them: PEFT would mean that as well.
    """
    names = set(names)
    everything = {plain_name(name) for name, _ in model.named_modules()}
    for ends in ({name.rpartition(".")[2] for name in names}, names):
        if {name for name in everything if _suffixes(name) & ends} == names:
            return sorted(ends)
    return "|".join(map(re.escape, sorted(names)))


def _suffixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def tensors_to_write(
    layers: Mapping[str, Mapping[str, Tensor]],
    saved: Mapping[str, Mapping[str, Tensor]],
    stacks: Mapping[str, int],
) -> dict[str, Tensor]:
    """By their keys in the file; arguments as in `StoredAdapter` and `read`."""
    experts = {n: (t["lora_a"], t["lora_b"]) for n, t in layers.items() if is_expert(n, stacks)}
    tensors = dict(peft_experts.stack(experts, stacks)) if experts else {}
    for name, parts in layers.items():
        if name not in experts:
            tensors |= {f"{name}.{_FACTORS[factor]}": value for factor, value in parts.items()}
    for name, parts in saved.items():
        tensors |= {f"{name}.{key}": value for key, value in parts.items()}
    return {_PREFIX + key: value for key, value in tensors.items()}


def patterns(values: Mapping[str, Any], stacks: Mapping[str, int]) -> tuple[Any, dict[str, Any]]:
    """The commonest value of the layers, and the other ones by name: PEFT's `r` and `rank_pattern`.

    The "^" keeps a pattern from other layers that end in the same name, as "0" is the end of "1.0".
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = {}
    for name, value in values.items():
        if value != common:
            others["^" + re.escape(pattern_name(name, stacks))] = value
    return common, others


def integral(value: float) -> float:
    """As an integer where it is one, which is how PEFT writes alpha."""
    return round(value) if math.isclose(value, round(value)) else value
