"""Checkpoints of a run: adapters, optimizer state, step and settings, as safetensors and JSON.

`checkpoint-000100/` is the state after 100 steps. It is written under another name, flushed and
renamed, and its manifest holds a checksum of every file: what is half written or damaged is never
resumed from. There is no state of random generators in it, because a step's randomness depends on
nothing but the run's seed and the step's number.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora import files
from qlora.adapter_files import load_adapter, save_adapter
from qlora.adapters import sole_adapter
from qlora.model_parts import plain_name

MANIFEST = "checkpoint.json"
OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d{6,})")


def save_checkpoint(
    output: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: Mapping[str, Mapping[str, Any]],
    keep: int,
) -> Path:
    """Write the state after `step` steps and delete all but the `keep` latest checkpoints."""
    path = output / f"checkpoint-{step:06d}"
    with files.new_folder(path) as folder:
        save_adapter(model, folder)
        files.write_tensors(folder / OPTIMIZER, _optimizer_tensors(model, optimizer))
        checksums = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        manifest = {"step": step, "settings": settings, "sha256": checksums}
        files.write_json(folder / MANIFEST, manifest)
    for old in _checkpoints(output)[keep:]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning."""
    for path in _checkpoints(output):
        try:
            _check_whole(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged and passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Mapping[str, Any]],
) -> int:
    """Restore adapters and optimizer; return the number of steps done.

    Raises:
        ValueError: the checkpoint was made with other settings; the message says which.
    """
    manifest = files.read_json(path / MANIFEST)
    _check_settings(path, manifest["settings"], settings)
    load_adapter(model, path, sole_adapter(model))
    _restore_optimizer(model, optimizer, path / OPTIMIZER)
    return manifest["step"]


def remove_checkpoints(output: Path) -> None:
    for path in _checkpoints(output):
        shutil.rmtree(path)


def _checkpoints(output: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _check_whole(path: Path) -> None:
    manifest = files.read_json(path / MANIFEST)
    for name, checksum in manifest["sha256"].items():
        if files.sha256(path / name) != checksum:
            raise ValueError(f"{name} is not what was written")


def _check_settings(
    path: Path,
    saved: Mapping[str, Mapping[str, Any]],
    now: Mapping[str, Mapping[str, Any]],
) -> None:
    for part, values in now.items():
        for name, value in values.items():
            before = saved.get(part, {}).get(name)
            if before != value:
                raise ValueError(
                    f"{path} was made with {part} {name} = {before!r}, and now it is {value!r}. "
                    "Resume with the same settings, use another output folder, or start over "
                    "(resume=False; --no-resume)"
                )


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """State as {parameter name}.{key of the state}, for instance ....lora_a.exp_avg."""
    names = _names(model)
    return {
        f"{names[parameter]}.{key}": tensor
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def _names(model: torch.nn.Module) -> dict[torch.nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in model.named_parameters()}


def _restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    names = _names(model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index = {names[parameter]: i for i, parameter in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in files.read_tensors(path).items():
        name, _, field = key.rpartition(".")
        if name not in index:
            raise ValueError(f"{path}: holds '{key}', and the model trains no such parameter")
        state.setdefault(index[name], {})[field] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
