"""Files are whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
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
    (tmp_path / "checkpoint-000100").mkdir()
    (tmp_path / ".checkpoint-000100.123.tmp.old").mkdir()
    (tmp_path / ".metrics.jsonl.9.tmp").touch()
    for mine in (".hidden", ".notes.tmp", "data.1.tmp"):
        (tmp_path / mine).touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", ".notes.tmp", "checkpoint-000100", "data.1.tmp"]


def test_a_folder_whose_replacement_never_came_goes_back_to_its_place(tmp_path: Path) -> None:
    """What a kill between the two renames of `new_folder` leaves."""
    for name in (".checkpoint-000100.123.tmp", ".checkpoint-000100.123.tmp.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-000100"]
    assert (tmp_path / "checkpoint-000100" / "file").read_text().endswith(".old")


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Of the same folder, and of no process that still runs."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [f".{name}.{ended.pid}.tmp" for name in ("out", "out2", "a.out")]
    running = f".out.{os.getppid()}.tmp"
    for name in (*left, running):
        (tmp_path / name / "inner").mkdir(parents=True)
    files.check_new_folder(tmp_path / "out")
    assert names(tmp_path) == sorted([*left[1:], running])


def test_a_folder_that_comes_back_to_its_place_is_not_written_over(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old = tmp_path / f".out.{ended.pid}.tmp.old"
    old.mkdir()
    (old / "file").touch()
    with pytest.raises(ValueError, match="exists already and is not an empty folder"):
        files.check_new_folder(tmp_path / "out")
    assert names(tmp_path / "out") == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """What it points to is made, even where that is not there yet."""
    link, target = tmp_path / "link", tmp_path / "far" / "target"
    link.symlink_to(target)
    for content in ("one", "two"):
        with files.new_folder(link) as temporary:
            (temporary / content).touch()
        assert link.is_symlink()
        assert names(target) == [content]
    assert names(tmp_path / "far") == ["target"]
    with pytest.raises(ValueError, match="target: exists already and is not an empty folder"):
        files.check_new_folder(link)


def test_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match=r"t: cannot write \(No space left on device\)"):
        files.write_tensors(tmp_path / "t", {"x": torch.ones(2)})
    assert names(tmp_path) == []


def test_a_folder_goes_back_to_its_place_when_its_replacement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "folder", os.replace

    def fail_for_the_new(source: Path, target: Path) -> None:
        if target == path and source.suffix != ".old":
            raise OSError("disk full")
        replace(source, target)

    with files.new_folder(path) as temporary:
        (temporary / "one").touch()
    monkeypatch.setattr(os, "replace", fail_for_the_new)
    with pytest.raises(OSError, match="disk full"), files.new_folder(path) as temporary:
        (temporary / "two").touch()
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["one"]


def test_a_place_for_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.check_new_folder(tmp_path / "new")
    files.check_new_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the current folder"):
        files.check_new_folder(".")
    Path("file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists already and is not an empty folder"):
            files.check_new_folder(taken)


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
    with pytest.raises(ValueError, match="list: expected a JSON object; got list"):
        files.read_json(tmp_path / "list")
