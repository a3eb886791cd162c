"""The safetensors files of a folder: written, read a tensor at a time, and what is said of damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora import shards
from tests.test_loading import maps


@pytest.mark.parametrize("limit", [1, 100, 300, 10**9])
def test_what_is_written_is_read(tmp_path: Path, limit: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
    tensors = {f"t{i}": torch.arange(i * 10).to(dtype) for i, dtype in enumerate(dtypes)}
    shards.write(tmp_path, "stem", tensors, limit)
    found = shards.Shards(tmp_path, "stem")
    assert found.entries.keys() == tensors.keys()
    for key, tensor in tensors.items():
        entry = found.entries[key]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found.read(key), tensor)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == {1: 5, 100: 3, 300: 2, 10**9: 1}[limit]
    assert (tmp_path / "stem.safetensors.index.json").exists() == (len(sizes) > 1)


def test_a_large_file_is_mapped_a_part_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that were read stay in memory as long as the map does."""
    monkeypatch.setattr(shards, "MAP_BYTES", 3 * 2**20)
    tensors = {f"t{i:02}": torch.full((2**18,), float(i)) for i in range(16)}
    shards.write(tmp_path, "stem", tensors)
    found = shards.Shards(tmp_path, "stem")
    for key, tensor in tensors.items():
        read = found.read(key)
        assert torch.equal(read, tensor)
        del read
        assert resident_bytes(tmp_path) <= 4 * 2**20
    found.close()
    assert not maps(tmp_path)


def resident_bytes(folder: Path) -> int:
    """Of the folder's files that are mapped, where the system says so."""
    table, size, ours = Path("/proc/self/smaps"), 0, False
    for line in table.read_text().splitlines() if table.exists() else []:
        name, *rest = line.split()
        ours = ours if name.endswith(":") else str(folder) in line
        size += 1024 * int(rest[0]) if ours and name == "Rss:" else 0
    return size


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    shards.write(tmp_path, "stem", {"a": torch.ones(2), "b": torch.ones(2)}, 1)
    index = tmp_path / "stem.safetensors.index.json"
    first, second = sorted(tmp_path.glob("*.safetensors"))
    save_file({"a": torch.ones(2)}, second)
    with pytest.raises(ValueError, match=f"{second.name}: a is in {first.name} as well"):
        shards.Shards(tmp_path, "stem")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"{second.name}: no such file"):
        shards.Shards(tmp_path, "stem")
    for content in ("{", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "{}"):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"stem\.safetensors\.index\.json"):
            shards.Shards(tmp_path, "stem")
