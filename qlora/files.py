"""Files that are whole or absent.

Each file and folder is written under a temporary name beside its place, flushed to the disk
and renamed. A reader, or the next run after a power cut, sees the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp(?P<old>\.old)?")


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block ends well."""
    path = Path(path)
    temporary = _temporary(path)
    mode = _usual_mode(temporary)
    try:
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes `path` when the block ends well.

    A folder that already lies there is replaced as a whole; a link, what it points to.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    old = temporary.with_name(f"{temporary.name}.old")
    mode = _usual_mode(temporary)
    temporary.unlink()
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                Path(folder, name).chmod(mode)
                flush(Path(folder, name))
            flush(Path(folder))
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
    flush(path.parent)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a place to which `new_folder` is not to write; remove what a killed process left of it.

    One machine at a time may write there: whether a process on another one still runs cannot be told.
    """
    path = Path(os.path.realpath(path))
    if path.parent.is_dir():
        remove_leftovers(path.parent, of=path.name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists already and is not an empty folder")
    if path == Path.cwd():
        raise ValueError(f"{path}: is the current folder, which cannot be replaced; name a new one")


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Delete what an interrupted `new_file` or `new_folder` left in `folder`.

    A folder that was moved out of the way, and that nothing has replaced, goes back to its place.

    Args:
        of: only the leftovers of this file or folder, and only those of processes that have ended.
    """
    for leftover in folder.glob(".*"):
        found = _LEFTOVER.fullmatch(leftover.name)
        if not found or (of is not None and (found["name"] != of or _is_alive(int(found["pid"])))):
            continue
        target = folder / found["name"]
        if found["old"] and not target.exists():
            os.replace(leftover, target)
        elif leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _is_alive(pid: int) -> bool:
    """Whether a process still runs, as far as the system tells."""
    if os.name != "posix":
        return True  # a signal would end it there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object; a missing or malformed file is an error that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object; got {type(value).__name__}")
    return value


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file; a full disk, say, is an OSError that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with new_file(path) as temporary:
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        try:
            save_file(on_cpu, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot write ({error})") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a safetensors file to the CPU; a missing or damaged file is an error that names it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from error


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    """A hidden name beside `path`, free for this process to use."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    return temporary


def _usual_mode(path: Path) -> int:
    """Create an empty file and say which permissions it got.

    safetensors' writer lets nobody but the owner read, whatever the user's umask allows.
    """
    path.touch()
    return path.stat().st_mode & 0o777


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
