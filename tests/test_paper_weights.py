"""The weights of trained models, out of the files in which they arrive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paper_repro.harness.lab import Lab
from paper_repro.materials import model, own_model, weights
from tests import paper_models, tiny


def test_ctranslate2_files_are_read(tmp_path: Path) -> None:
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    single = np.linspace(0, 1, 5, dtype=np.float32)
    variables = {"half": half, "an int": np.int8(7), "single": single, "scalar": np.float32(2.5)}
    path = paper_models.write_ctranslate2(tmp_path / "model.bin", variables)
    found = weights.read_ctranslate2(path)
    assert list(found) == ["half", "single", "scalar"]
    assert found["half"].dtype == torch.float16
    assert torch.equal(found["half"], torch.from_numpy(half))
    assert torch.equal(found["single"], torch.from_numpy(single))
    assert found["scalar"].shape == ()


def test_a_ctranslate2_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = paper_models.whisper(tmp_path / "model.bin")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.bin ends \d+ bytes short"):
        weights.read_ctranslate2(path)


def test_bytes_that_do_not_fill_the_shape_are_refused(tmp_path: Path) -> None:
    path = paper_models.write_ctranslate2(tmp_path / "model.bin", {"v": np.zeros(4, np.float32)})
    path.write_bytes(path.read_bytes().replace(b"\x01\x04\0\0\0", b"\x01\x05\0\0\0"))
    with pytest.raises(ValueError, match=r"v has 16 bytes, which do not fill \[5\]"):
        weights.read_ctranslate2(path)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    llama = tiny.model_folder(tmp_path / "llama")
    paper_models.stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(model, "model_folder", lambda cache: llama)
    monkeypatch.setattr(own_model, "own_folder", lambda lab: llama)
    return Lab(tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "count", "example", "shape"),
    [
        ("minilm", 12, "encoder.layer.1.intermediate.dense.weight", (96, 64)),
        ("whisper", 3, "decoder/layer_0/self_attention/linear_0/weight", (192, 64)),
        ("own", 14, "model.layers.1.mlp.down_proj.weight", (64, 96)),
        ("smollm2", 14, "model.layers.0.self_attn.k_proj.weight", (32, 64)),
    ],
)
def test_linear_weights_are_those_of_the_blocks(
    sources: Lab, name: str, count: int, example: str, shape: tuple[int, int]
) -> None:
    found = weights.linear_weights(sources, name)
    assert len(found) == count
    assert found[example].shape == shape
    assert all(weight.dtype == torch.float32 and weight.ndim == 2 for weight in found.values())
    assert len(weights.digest(sources, name)) == 64


def test_every_source_has_a_label(sources: Lab) -> None:
    for name in weights.LABELS:
        assert weights.linear_weights(sources, name)
    with pytest.raises(
        ValueError, match="name must be one of minilm, whisper, own, smollm2, got 'gpt'"
    ):
        weights.linear_weights(sources, "gpt")
