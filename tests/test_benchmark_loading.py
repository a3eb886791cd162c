"""The benchmark of loading, on a folder of a few megabytes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loading
from qlora import shards
from qlora.pretrained import load_dense

OPTIONS = Namespace(gigabytes=0.004, device="cpu")


@pytest.mark.parametrize(("gigabytes", "width"), [(0.001, 128), (0.1, 512), (3.0, 2048)])
def test_the_folder_is_at_least_as_large_as_asked(gigabytes: float, width: int) -> None:
    from qlora.loading import skeleton

    config = loading._config(gigabytes * 1e9)
    size = sum(parameter.nbytes for parameter in skeleton(config).parameters())
    layer = size / (config.num_hidden_layers + 1)
    assert config.hidden_size == width
    assert gigabytes * 1e9 <= size < gigabytes * 1e9 + 2 * max(layer, 2e6)


def test_the_folder_is_a_model_of_random_weights(tmp_path: Path) -> None:
    size = loading.make(tmp_path / "model", 0.004, shard_bytes=10**6)
    entries = shards.Shards(tmp_path / "model").entries
    assert len({entry.file for entry in entries.values()}) > 3
    model = load_dense(tmp_path / "model")
    assert sum(parameter.nbytes for parameter in model.parameters()) == size >= 4e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    assert not torch.equal(first, second)


def test_every_step_is_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for speed; the folder stays where one was named, and is used again."""
    made = []

    def here(step: str, *arguments: Any) -> dict[str, Any]:
        made.append(step)
        return loading._run(step, *arguments)

    monkeypatch.setattr(loading, "_child", here)
    tmp_path /= "new"
    arguments = ["--gigabytes", "0.004", "--folder", str(tmp_path)]
    assert loading.main(arguments) == 0
    table = capsys.readouterr().out
    for what in loading.STEPS.values():
        assert f"\n{what}  " in table
    assert "of the dense one" in table
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    monkeypatch.setattr(loading, "_fits", lambda folder: False)
    assert loading.main(arguments) == 0
    assert "load all, then quantize   not run" in capsys.readouterr().out
    steps = list(loading.STEPS)
    assert made == ["make", *steps, *steps[:-1]]
    with pytest.raises(SystemExit):
        loading.main(["--gigabytes", "0.01", "--folder", str(tmp_path)])
    assert "dense: is not of 0.01 GB" in capsys.readouterr().err


def test_one_file_holds_what_several_do(tmp_path: Path) -> None:
    loading.make(tmp_path / "dense", 0.004, shard_bytes=10**6)
    loading.join(tmp_path / "dense", tmp_path / "single")
    several, one = (load_dense(tmp_path / name).state_dict() for name in ("dense", "single"))
    assert several.keys() == one.keys()
    assert all(torch.equal(several[name], one[name]) for name in one)
    assert len(list((tmp_path / "single").glob("*.safetensors"))) == 1


def test_a_gpu_that_is_not_there_is_a_clear_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        loading.main(["--device", "cuda"])
    assert "--device cuda: this machine has no CUDA GPU" in capsys.readouterr().err


def test_a_step_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    loading.make(tmp_path / "dense", 0.004)
    ballast = torch.ones(200 * 2**20 // 4)
    measured = loading.Measured(**loading._child("load", tmp_path / "dense", tmp_path, OPTIONS))
    assert 0 < measured.start_bytes <= measured.peak_bytes
    assert 1e6 < measured.model_bytes < 4e6
    assert measured.gpu_bytes is None
    assert measured.seconds < 60
    here = loading.measure(lambda: ballast.nbytes, torch.device("cpu"))
    assert here.model_bytes == ballast.nbytes
    assert measured.peak_bytes < here.peak_bytes


def test_the_watch_sees_memory_that_comes_and_goes() -> None:
    """Where the system tells; elsewhere there is nothing to see."""

    def use() -> int:
        block = torch.ones(100 * 2**20 // 4)
        loading.time.sleep(0.1)
        return block.nbytes

    before = loading._status("RssAnon")
    measured = loading.measure(use, torch.device("cpu"))
    if before is None:
        assert measured.anonymous_bytes is None
    else:
        assert measured.anonymous_bytes > before + 90 * 2**20
