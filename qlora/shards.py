"""The safetensors files of a model folder: what they hold, read a tensor at a time, written a file at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora import files

SHARD_BYTES = 2 * 10**9  # a file holds no more, unless it is a single tensor
MAP_BYTES = 256 * 10**6  # after so much has been read of a file it is mapped anew

_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is.

    Attributes:
        dtype: None for one that is none of torch's usual.
        in_4_bits: it is read as a QuantizedTensor, the weight of a linear layer: its shape is [n, k] whichever
            way the model's own lies, its dtype what it was in before.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    in_4_bits: bool = False


class Tensors(Protocol):
    """A folder's tensors: `Shards`, or what makes others of them."""

    entries: dict[str, Entry]

    def read(self, key: str) -> Any:
        """A tensor; a QuantizedTensor where the entry says so."""

    def close(self) -> None:
        """Drop what is kept open."""


class Shards:
    """The tensors of a folder's safetensors files, of which one at a time is open.

    What is read of a file stays in memory as long as the file is mapped, so that a large one is opened
    again now and then: no more than MAP_BYTES and one tensor are mapped. The files are STEM.safetensors,
    or those that STEM.safetensors.index.json names.

    Attributes:
        entries: by key, in the order in which reading opens each file once.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.entries: dict[str, Entry] = {}
        self._file: Any = None
        self._path: Path | None = None
        self._read_bytes = 0
        for path in paths(folder, stem) or [folder / f"{stem}.safetensors"]:
            self._open(path)
            self._list(path)
        self.close()

    def _list(self, path: Path) -> None:
        """Enter what the open file holds, by its header alone."""
        for key in self._file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if key in self.entries:
                raise ValueError(f"{path}: {key} is in {self.entries[key].file.name} as well")
            part = self._file.get_slice(key)
            dtype = _BY_NAME.get(part.get_dtype())
            self.entries[key] = Entry(path, tuple(part.get_shape()), dtype)

    def read(self, key: str) -> Tensor:
        """A tensor on the CPU, in the file's mapped memory: what is to stay must be copied."""
        entry = self.entries[key]
        if self._path != entry.file or self._read_bytes >= MAP_BYTES:
            self._open(entry.file)
        tensor = self._file.get_tensor(key)
        self._read_bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Drop the open file's map, as far as no tensor uses it."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._file = self._path = None

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.close()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            self._file = safe_open(path, framework="pt").__enter__()
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(
                f"{path}: truncated or not a safetensors file ({error}); "
                "download it again; is it a git-lfs pointer?"
            ) from error
        self._path, self._read_bytes = path, 0


def paths(folder: Path, stem: str = "model") -> list[Path]:
    """The one file, or those that the index names; none where neither is there."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    names = files.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map must name the file of each tensor")
    return [folder / name for name in sorted(set(names.values()))]


def write(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors to one file, or to several with an index, named as transformers names a model's."""
    shards = list(cut(tensors, shard_bytes))
    if len(shards) == 1:
        files.write_tensors(folder / f"{stem}.safetensors", tensors)
        return
    for i, keys in enumerate(shards):
        files.write_tensors(
            folder / shard_name(stem, i, len(shards)), {k: tensors[k] for k in keys}
        )
    write_index(folder, stem, shards, sum(tensor.nbytes for tensor in tensors.values()))


def shard_name(stem: str, i: int, count: int) -> str:
    """The name of file `i`, from 0, of `count`."""
    return f"{stem}-{i + 1:05}-of-{count:05}.safetensors"


def write_index(folder: Path, stem: str, shards: Sequence[Sequence[str]], size: int) -> None:
    """Write which file holds which of the keys, of `size` bytes together."""
    weight_map = {
        key: shard_name(stem, i, len(shards)) for i, keys in enumerate(shards) for key in keys
    }
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    files.write_json(folder / f"{stem}.safetensors.index.json", index)


def cut(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """The keys in order, as many to a file as fit."""
    keys: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        if keys and size + tensor.nbytes > shard_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys
