"""An interruption leaves no trace: a resumed run ends bit for bit where it would have ended."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.adapters import adapter_parameters
from qlora.checkpoint import OPTIMIZER, load_checkpoint, save_checkpoint
from qlora.files import read_tensors
from qlora.train import make_optimizer, train, train_step
from tests import tiny
from tests.runs import SMALL, metrics, model, run, same

Run = tuple[torch.nn.Module, Path]


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a run break off in the middle of the step after `after` steps."""

    def step(*args: Any) -> dict[str, float]:
        if args[-1] == after:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(importlib.import_module("qlora.train"), "train_step", step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("uninterrupted")
    return run(output)[0], output


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Run,
    after: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    torch.manual_seed(99)  # whatever the generators are at by then
    resumed, result = run(tmp_path)
    whole, output = uninterrupted
    assert result.resumed_from == 2 * (after // 2)
    assert same(resumed, whole)
    assert metrics(tmp_path) == metrics(output), "each step once, with the same numbers"


OPTIMIZERS = [
    ({"optimizer": "paged_adamw_8bit"}, {}),
    ({"optimizer": "adamw_torch"}, {}),
    ({"optimizer": "adamw_torch"}, {"adapter_dtype": "bfloat16"}),
    ({"optimizer": "paged_adamw_32bit"}, {"adapter_dtype": "bfloat16"}),
    (
        {"optimizer": "paged_adamw_32bit", "stochastic_rounding": True},
        {"adapter_dtype": "bfloat16"},
    ),
    ({"optimizer": "paged_adamw_8bit", "stochastic_rounding": True}, {"adapter_dtype": "bfloat16"}),
    ({"loraplus_ratio": 8.0}, {}),
    ({"loraplus_ratio": 8.0, "optimizer": "adamw_torch"}, {}),
]


@pytest.mark.parametrize(("recipe", "settings"), OPTIMIZERS)
def test_every_optimizer_resumes_bit_identically(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    config = replace(SMALL, steps=4, **recipe)
    whole, _ = run(tmp_path / "whole", config, settings=settings)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", config, settings=settings)
    torch.manual_seed(99)
    resumed, result = run(tmp_path / "broken", config, settings=settings)
    assert result.resumed_from == 2
    assert same(resumed, whole)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    last = (tmp_path / name / "checkpoint-000004" / OPTIMIZER for name in ("broken", "whole"))
    assert_same_tensors(*map(read_tensors, last))


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_saved_exactly_and_without_their_padding(tmp_path: Path, bits: int) -> None:
    """They are views of shared buffers, which safetensors refuses where they overlap."""
    net = model()
    optimizer = make_optimizer(net, replace(SMALL, optimizer=f"paged_adamw_{bits}bit"))
    for p in adapter_parameters(net).values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    path = save_checkpoint(tmp_path, net, optimizer, 1, {}, keep=1)
    parameters = dict(net.named_parameters())
    saved = read_tensors(path / OPTIMIZER)
    expected = {
        f"{name}.{key}": tensor
        for name, p in parameters.items()
        if p in optimizer.state
        for key, tensor in optimizer.state[p].items()
    }
    assert_same_tensors(saved, expected)
    assert {t.dtype for t in saved.values()} >= {torch.uint8 if bits == 8 else torch.float32}
    size = sum(t.numel() * t.element_size() for t in saved.values())
    assert size <= (path / OPTIMIZER).stat().st_size < 1.5 * size + 2**15, (
        "views, not whole buffers"
    )
    restored = make_optimizer(net, replace(SMALL, optimizer=f"paged_adamw_{bits}bit"))
    assert load_checkpoint(path, net, restored, {}) == 1
    for p, state in optimizer.state.items():
        assert_same_tensors(restored.state[p], state)


def test_dropout_is_at_work_in_these_tests(tmp_path: Path, uninterrupted: Run) -> None:
    assert not same(run(tmp_path, dropout=0.0)[0], uninterrupted[0])


def test_a_finished_run_is_not_run_again(tmp_path: Path, uninterrupted: Run) -> None:
    shutil.copytree(uninterrupted[1], tmp_path, dirs_exist_ok=True)
    again, result = run(tmp_path)
    assert same(again, uninterrupted[0])
    assert (result.steps, result.resumed_from) == (6, 6)
    assert result.loss == metrics(tmp_path)[-1]["loss"]


def test_a_run_with_a_constant_rate_can_be_prolonged(tmp_path: Path, uninterrupted: Run) -> None:
    run(tmp_path, replace(SMALL, steps=3))
    resumed, result = run(tmp_path)
    assert result.resumed_from == 3
    assert same(resumed, uninterrupted[0])


def test_start_over(tmp_path: Path, uninterrupted: Run) -> None:
    run(tmp_path, replace(SMALL, seed=1))
    net, result = run(tmp_path, resume=False)
    assert result.resumed_from == 0
    assert same(net, uninterrupted[0])
    assert len(metrics(tmp_path)) == 6


def test_only_the_latest_checkpoints_are_kept(uninterrupted: Run) -> None:
    names = sorted(path.name for path in uninterrupted[1].iterdir())
    checkpoints = ["checkpoint-000004", "checkpoint-000006"]
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert names == [*adapter, *checkpoints, "metrics.jsonl", "qlora_config.json"]
    held = {path.suffix for path in uninterrupted[1].rglob("*") if path.is_file()}
    assert held == {".json", ".jsonl", ".safetensors"}, "nothing pickled"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path,
    uninterrupted: Run,
    file: str,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(uninterrupted[1], tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoint-000006" / file)
    with pytest.warns(UserWarning, match="checkpoint-000006 is damaged"):
        resumed, result = run(tmp_path)
    assert result.resumed_from == 4
    assert same(resumed, uninterrupted[0])
    assert metrics(tmp_path) == metrics(uninterrupted[1])


def test_what_was_half_written_is_never_read(tmp_path: Path, uninterrupted: Run) -> None:
    shutil.copytree(uninterrupted[1], tmp_path, dirs_exist_ok=True)
    half = tmp_path / ".checkpoint-000008.4711.tmp"
    shutil.copytree(tmp_path / "checkpoint-000006", half)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    _, result = run(tmp_path)
    assert result.resumed_from == 6
    assert not half.exists()
    assert metrics(tmp_path) == metrics(uninterrupted[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(SMALL, beta2=0.9)}, "recipe beta2 = 0.999, and now it is 0.9"),
        ({"config": replace(SMALL, micro_batch_size=4)}, "recipe micro_batch_size = 2"),
        ({"dropout": 0.2}, r"adapter dropout = 0\.1, and now it is 0\.2"),
        (
            {"config": replace(SMALL, optimizer="paged_adamw_8bit")},
            "recipe optimizer = 'paged_adamw_32bit', and now it is 'paged_adamw_8bit'",
        ),
        ({"adapter_dtype": "bfloat16"}, "adapter_dtype = 'float32', and now it is 'bfloat16'"),
        ({"rank": 8}, "adapter rank = 4, and now it is 8"),
        ({"format": "fp4"}, "adapter format = 'nf4', and now it is 'fp4'"),
        ({"data": tiny.examples(11)}, "data examples = 12, and now it is 11"),
        ({"data": tiny.examples(12, seed=5)}, "data sha256"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    uninterrupted: Run, change: dict[str, Any], message: str
) -> None:
    config = change.pop("config", SMALL)
    data = change.pop("data", tiny.examples())
    net = model(**{"dropout": 0.1} | change)
    with pytest.raises(ValueError, match=message):
        train(net, data, config, uninterrupted[1], progress=False)


def test_a_checkpoint_over_another_base_is_refused(uninterrupted: Run) -> None:
    """Of the same shapes: nothing else would tell."""
    net = tiny.quantized(tiny.llama(seed=1), dropout=0.1)
    with pytest.raises(ValueError, match=r"base fingerprint = '[0-9a-f]{16}', and now it is '"):
        train(net, tiny.examples(), SMALL, uninterrupted[1], progress=False)
