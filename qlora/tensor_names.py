"""Whether a model folder's tensors are the model's own, and by which names the model has them.

transformers renames what older folders hold, and merges or splits some weights as it reads them. This
file asks it what it would do, by private names of transformers where it must. (Others are in `experts`, by which
stacked weights are known, and in `loading`, which makes a model without values.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from qlora.folder_config import first_line
from qlora.shards import Entry, Tensors

# Keys that older versions of transformers wrote, for tables that the model makes by itself now:
# the buffer's name, and what is ignored where the model has such a buffer.
_FORMER_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


class NotStreamable(Exception):
    """Why a folder cannot be read one tensor at a time, and transformers has to read it as a whole."""


def match(shards: Tensors, model: nn.Module) -> dict[str, list[str]]:
    """The names in the model by the key in the files, each of the model's tensors once.

    Raises:
        NotStreamable: a tensor is not the model's by name, shape or dtype, or is missing.
    """
    tensors = model.state_dict(keep_vars=True)
    names_of = {name: names for names in shared_names(tensors) for name in names}
    ignored = _ignored(model)
    places: dict[str, list[str]] = {}
    key_of: dict[str, str] = {}
    try:
        renamed = _renamed(model, shards.entries, tensors)
    except Exception as error:  # private functions, which may change with transformers
        raise NotStreamable(
            f"transformers does not say what it renames ({first_line(error)})"
        ) from error
    for key, name in renamed.items():
        own = tensors.get(name) if name else None
        if own is None and ignored is not None and ignored.search(name or key):
            continue
        _check(key, name, shards.entries[key], own)
        names = names_of[name]
        first = key_of.setdefault(names[0], key)
        if first != key:
            _check_tied(shards, first, key)
            continue
        places[key] = names
    found = {name for names in places.values() for name in names}
    if missing := sorted(tensors.keys() - found):
        raise NotStreamable(f"{missing[0]} is missing in the files")
    return places


def _check(key: str, name: str | None, entry: Entry, own: object) -> None:
    """Whether a tensor of the files can take the place of the model's."""
    if name is None:
        raise NotStreamable(f"transformers merges or splits weights as it reads them ({key})")
    if not isinstance(own, Tensor):
        raise NotStreamable(f"{key} is not in config.json's model")
    turned = entry.in_4_bits and entry.shape == own.shape[::-1]
    if entry.shape != own.shape and not turned:
        shapes = f"{entry.shape} in the files and {tuple(own.shape)} by config.json"
        raise NotStreamable(f"{key} is {shapes}")
    if not _castable(entry.dtype, own.dtype):
        raise NotStreamable(f"{key} has another dtype than {own.dtype}")


def _check_tied(shards: Tensors, first: str, second: str) -> None:
    """Two tensors for one of the model's: transformers drops one if they are equal, and unties them if not."""
    in_4_bits = any(shards.entries[key].in_4_bits for key in (first, second))
    if in_4_bits or not torch.equal(shards.read(first), shards.read(second)):
        raise NotStreamable(f"{first} and {second} are tied by config.json and differ in the files")


def _renamed(
    model: nn.Module, keys: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """The model's name for each key, as transformers renames it; None where it merges, splits or turns."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    names = {}
    for key in sorted(keys):
        name, converter = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:  # the pattern was not meant for this one
            name, converter = rename_source_key(key, [], [], prefix, tensors)
        names[key] = name if converter is None else None
    return {key: names[key] for key in keys}


def stays_dense(model: nn.Module, name: str, skipped: Sequence[str]) -> bool:
    """Whether transformers with bitsandbytes leaves a linear layer as it is, if config.json lists those skipped."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    always = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not should_convert_module(name, [*skipped, *always])


def has_mixed_dtypes(model: nn.Module) -> bool:
    """Whether transformers keeps some modules of this 16-bit model in fp32."""
    names = {"_keep_in_fp32_modules_strict"} if model.dtype != torch.float32 else set()
    if model.dtype == torch.float16:
        names.add("_keep_in_fp32_modules")
    return any(getattr(model, name, None) for name in names)


def shared_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state dict (with `keep_vars`), those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _castable(given: torch.dtype | None, own: torch.dtype) -> bool:
    if given is None:
        return False
    return given == own or (given.is_floating_point and own.is_floating_point)


def _ignored(model: nn.Module) -> re.Pattern[str] | None:
    """Keys that transformers passes over in silence for this model."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    for ending, pattern in _FORMER_BUFFERS.items():
        if any(name.endswith(ending) for name in buffers):
            patterns.add(pattern)
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
