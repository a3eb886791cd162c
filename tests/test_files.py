"""Files are whole or absent."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qlora import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    files.write_text(path, "one")
    with suppress(KeyboardInterrupt), files.new_file(path) as temporary:
        temporary.write_text("tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert names(path.parent) == ["file.txt"]


def test_a_folder_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with files.new_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            assert not path.exists() or content == "two"
    with suppress(KeyboardInterrupt), files.new_folder(path) as temporary:
        (temporary / "three").write_text("thr")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder"]
    assert names(path / "inner") == ["two"]


def test_only_leftovers_of_ours_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-000100.123.tmp").mkdir()
    (tmp_path / ".checkpoint-000100.123.tmp.old").mkdir()
    (tmp_path / ".metrics.jsonl.9.tmp").touch()
    for mine in (".hidden", ".notes.tmp", "data.1.tmp"):
        (tmp_path / mine).touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", ".notes.tmp", "data.1.tmp"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files.write_tensors(tmp_path / "a", {"x": torch.ones(2)})
        with files.new_folder(tmp_path / "b") as temporary:
            files.write_json(temporary / "c", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "b" / "c")} == {
        0o644
    }


def test_tensors_and_json_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 6).mT, "b": torch.zeros((), dtype=torch.bfloat16)}
    files.write_tensors(tmp_path / "t", tensors)
    back = files.read_tensors(tmp_path / "t")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    files.write_json(tmp_path / "j", {"x": [1, None, "ä"]})
    assert files.read_json(tmp_path / "j") == {"x": [1, None, "ä"]}
    assert (tmp_path / "j").read_text().endswith("}\n")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for read in (files.read_json, files.read_tensors):
        with pytest.raises(FileNotFoundError, match="gone: no such file"):
            read(tmp_path / "gone")
    (tmp_path / "bad").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="bad: not valid JSON"):
        files.read_json(tmp_path / "bad")
    with pytest.raises(ValueError, match="bad: truncated or not a safetensors file"):
        files.read_tensors(tmp_path / "bad")
    (tmp_path / "list").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="list: expected a JSON object, found list"):
        files.read_json(tmp_path / "list")
