"""The linear layers' weights of four trained models: three never quantized before, and SmolLM2 from its lattice."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from paper_repro.harness.lab import Lab
from paper_repro.materials import assets, model, own_model
from qlora import files


@dataclass(frozen=True)
class _Source:
    """Where a model's weights come from.

    Attributes:
        read: all tensors of its file.
        prefix: how the names of the blocks' tensors begin.
        digest: the SHA-256 of the file.
    """

    read: Callable[[Lab], dict[str, torch.Tensor]]
    prefix: str
    digest: Callable[[Lab], str]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return files.read_tensors(folder / "model.safetensors")


_SOURCES = {
    "minilm": _Source(
        lambda lab: _tensors(assets.minilm_folder(lab.folder)),
        "encoder.layer.",
        lambda lab: assets.MINILM_SHA256[assets.MINILM_FILE],
    ),
    "whisper": _Source(
        lambda lab: read_ctranslate2(assets.whisper_file(lab.folder)),
        "decoder/layer_",
        lambda lab: assets.WHISPER_SHA256,
    ),
    "own": _Source(
        lambda lab: _tensors(own_model.own_folder(lab)),
        "model.layers.",
        lambda lab: model.weights_digest(own_model.own_folder(lab)),
    ),
    "smollm2": _Source(
        lambda lab: _tensors(model.model_folder(lab.folder)),
        "model.layers.",
        lambda lab: assets.MODEL_SHA256,
    ),
}
LABELS = {
    "minilm": "MiniLM's encoder",
    "whisper": "Whisper tiny.en's decoder",
    "own": "our own model",
    "smollm2": "SmolLM2-135M",
}

# CTranslate2's numbers for what its variables consist of, as far as they are weights.
_DTYPES = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}


def linear_weights(lab: Lab, name: str) -> dict[str, torch.Tensor]:
    """Every weight of a linear layer in the transformer's blocks, fp32 [out, in], by its name in the model's file.

    Embeddings, output layers and, in Whisper, the encoder are left out.
    """
    source = _source(name)
    return {
        key: tensor.float()
        for key, tensor in source.read(lab).items()
        if key.startswith(source.prefix) and key.endswith("weight") and tensor.ndim == 2
    }


def digest(lab: Lab, name: str) -> str:
    """The SHA-256 of the file with these weights: what is measured on them depends on it."""
    return _source(name).digest(lab)


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise ValueError(f"name must be one of {', '.join(_SOURCES)}, got {name!r}")
    return _SOURCES[name]


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """The floating-point variables of a model.bin of CTranslate2's, as its `ModelSpec` writes them.

    All integers are little-endian. The file: version (4 bytes), name of the model's kind, its revision (4), number
    of variables (4), and for each its name, rank (1), sizes (4 each), type (1), number of bytes (4) and the bytes
    themselves. A text is its length with a closing zero (2), and its bytes with that zero. Aliases that follow are
    not read.

    Raises:
        ValueError: the file is cut short, or a variable's bytes do not fit its shape.
    """
    variables = {}
    with path.open("rb") as file:
        _numbers(file, "I")
        _text(file)
        _, count = _numbers(file, "II")
        for _ in range(count):
            name = _text(file)
            (rank,) = _numbers(file, "B")
            *shape, kind, size = _numbers(file, f"{rank}IBI")
            data = _bytes(file, size)
            if (dtype := _DTYPES.get(kind)) is None:
                continue
            tensor = torch.frombuffer(bytearray(data), dtype=dtype)
            if tensor.numel() != torch.Size(shape).numel():
                raise ValueError(f"{path}: {name} has {size} bytes, which do not fill {shape}")
            variables[name] = tensor.view(shape)
    return variables


def _text(file: BinaryIO) -> str:
    (length,) = _numbers(file, "H")
    return _bytes(file, length)[:-1].decode()


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    layout = f"<{layout}"
    return struct.unpack(layout, _bytes(file, struct.calcsize(layout)))


def _bytes(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{file.name} ends {count - len(data)} bytes short of a variable's end")
    return data
