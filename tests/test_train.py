"""The loop: what it learns, what it counts, and that an interruption leaves no trace."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora import train as train_module
from qlora.adapters import adapter_parameters, load_adapter
from qlora.batching import collate
from qlora.data import IGNORE, Example
from qlora.evaluation import evaluate, summed_loss
from qlora.recipe import TrainConfig, learning_rate
from qlora.train import make_optimizer, train, train_step
from tests import tiny

SMALL = TrainConfig(
    learning_rate=5e-3,
    steps=6,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    checkpoint_every=2,
)


def model(dropout: float = 0.0, **settings: Any) -> torch.nn.Module:
    return tiny.quantized(tiny.llama(), dropout=dropout, **settings)


def run(output: Path, config: TrainConfig = SMALL, dropout: float = 0.1, **options: Any) -> Any:
    """(model, result) of a quiet run."""
    trained = model(dropout)
    options = {"progress": False, **options}
    return trained, train(trained, tiny.examples(), config, output, **options)


def metrics(output: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Bit for bit."""
    pairs = zip(adapter_parameters(left).values(), adapter_parameters(right).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let a run break off in the middle of the step after ``after`` steps."""

    def step(*args: Any) -> dict[str, float]:
        if args[-1] == after:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(train_module, "train_step", step)


# Settings


def test_the_defaults_are_the_guanaco_recipe() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.schedule, config.warmup_steps) == (2e-4, "constant", 0)
    assert (config.batch_size, config.steps, config.max_length) == (16, 1875, 512)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.0)
    assert config.max_grad_norm == 0.3
    assert config.group_by_length
    assert config.gradient_checkpointing


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be finite and at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be of type int, got 1.5"),
        ({"seed": True}, TypeError, "seed must be of type int"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be finite"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be finite"),
        ({"beta2": 1.0}, ValueError, "beta2 must be below 1"),
        ({"schedule": "step"}, ValueError, "schedule must be one of constant, linear, cosine"),
        ({"precision": "int8"}, ValueError, "precision must be one of auto, bfloat16, float32"),
        ({"group_by_length": 1}, TypeError, "group_by_length must be of type bool"),
    ],
)
def test_wrong_settings_are_named(
    setting: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**setting)


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        config = TrainConfig(learning_rate=8.0, schedule=schedule, warmup_steps=4, steps=8)
        return [learning_rate(config, step) for step in range(8)]

    warmup = [2.0, 4.0, 6.0, 8.0]
    assert rates("constant") == [*warmup, 8, 8, 8, 8]
    assert rates("linear") == [*warmup, 8, 6, 4, 2]
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([*warmup, 8, 4 + 4 * half, 4, 4 - 4 * half])
    assert learning_rate(TrainConfig(), 0) == 2e-4


# Learning


def test_the_loss_falls(tmp_path: Path) -> None:
    config = replace(SMALL, steps=40, learning_rate=1e-2, checkpoint_every=0)
    held_out = tiny.examples(6, seed=9)
    trained = model()
    before = evaluate(trained, held_out)
    result = train(
        trained, tiny.examples(), config, tmp_path, eval_dataset=held_out, progress=False
    )
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["loss"] == result.loss
    assert result.loss < 0.4 * records[0]["loss"]
    assert result.evaluation is not None
    assert result.evaluation.nll < 0.6 * before.nll
    assert result.evaluation == evaluate(trained, held_out, batch_size=2)
    assert records[-1]["eval_perplexity"] == result.evaluation.perplexity
    restored = model()
    load_adapter(restored, tmp_path)
    assert same(restored, trained)


def test_the_base_stays_as_it_is(tmp_path: Path) -> None:
    fresh = model().state_dict()
    trained, _ = run(tmp_path)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, fresh[name]) != ("lora_" in name), name


def test_prompts_and_padding_contribute_no_loss() -> None:
    """Against the definition, token by token."""
    net, data = tiny.llama(), tiny.examples(3)
    expected, targets = 0.0, 0
    for example in data:
        log_probabilities = F.log_softmax(tiny.logits(net, example.input_ids[None])[0], dim=-1)
        for i in range(1, len(example)):
            if example.labels[i] != IGNORE:
                expected -= log_probabilities[i - 1, example.input_ids[i]].item()
                targets += 1
    with torch.no_grad():
        loss = summed_loss(net, collate(data), torch.device("cpu")).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    result = evaluate(net, data, batch_size=2)
    assert result.tokens == targets
    assert result.nll == pytest.approx(expected / targets, rel=1e-5)
    assert result.perplexity == math.exp(result.nll)


def test_four_micro_batches_of_one_equal_one_of_four() -> None:
    """Examples differ in length, so a mean of means would be wrong by far."""
    data = tiny.examples(4)
    outcomes = []
    for split in ([data], [[example] for example in data]):
        net = model()
        optimizer = make_optimizer(net, SMALL)
        parameters = list(adapter_parameters(net).values())
        batches = [collate(part) for part in split]
        records = [train_step(net, optimizer, parameters, batches, SMALL, i) for i in range(3)]
        outcomes.append(records)
    for one, four in zip(*outcomes, strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
        assert (one["tokens"], one["targets"]) == (four["tokens"], four["targets"])


def test_the_gradient_is_clipped_and_its_norm_reported_before() -> None:
    config = replace(SMALL, max_grad_norm=1e-3)
    net = model()
    optimizer = make_optimizer(net, config)
    seen: list[float] = []

    def look(*_: Any) -> None:
        norms = torch.stack([p.grad.norm() for p in adapter_parameters(net).values()])
        seen.append(norms.norm().item())

    optimizer.register_step_pre_hook(look)
    parameters = list(adapter_parameters(net).values())
    record = train_step(net, optimizer, parameters, [collate(tiny.examples(4))], config, 0)
    assert record["grad_norm"] > 0.1
    assert seen == pytest.approx([1e-3], rel=1e-2)


def test_gradient_checkpointing_computes_twice_and_the_same(tmp_path: Path) -> None:
    nets, calls = [], []
    for enabled in (True, False):
        net = model(dropout=0.1)
        counted: list[int] = []
        attention = net.model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, c=counted: c.append(1))
        config = replace(SMALL, gradient_checkpointing=enabled)
        train(net, tiny.examples(), config, tmp_path / str(enabled), progress=False)
        nets.append(net)
        calls.append(len(counted))
    assert same(*nets)
    assert calls == [2 * calls[1], 6 * 2], "6 steps of 2 micro-batches"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in nets[0].modules())


def test_bfloat16_computes_in_bfloat16_and_learns_in_float32(tmp_path: Path) -> None:
    net, seen = model(), set()
    net.model.layers[1].mlp.down_proj.register_forward_hook(lambda *a: seen.add(a[2].dtype))
    train(net, tiny.examples(), replace(SMALL, precision="bfloat16"), tmp_path, progress=False)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in adapter_parameters(net).values()} == {torch.float32}


def test_any_torch_model_that_returns_logits_can_be_trained(tmp_path: Path) -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(258, 64)
            self.hidden, self.head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 258)

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
            return self.head(torch.tanh(self.hidden(self.embedding(input_ids))))

    torch.manual_seed(0)
    net = tiny.quantized(Bigram())
    config = replace(SMALL, steps=20, learning_rate=0.05)
    result = train(net, tiny.examples(), config, tmp_path, progress=False)
    assert result.loss < 0.5 * metrics(tmp_path)[0]["loss"]


def test_training_leaves_modes_and_generators_as_they_were(tmp_path: Path) -> None:
    net = model().eval()
    net.lm_head.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(net, tiny.examples(), replace(SMALL, steps=1), tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert {name for name, m in net.named_modules() if m.training} == {"lm_head"}


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    output = tmp_path_factory.mktemp("uninterrupted")
    return run(output)[0], output


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: tuple[torch.nn.Module, Path],
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


def test_dropout_is_at_work_in_these_tests(
    tmp_path: Path, uninterrupted: tuple[torch.nn.Module, Path]
) -> None:
    assert not same(run(tmp_path, dropout=0.0)[0], uninterrupted[0])


def test_a_finished_run_is_not_run_again(
    tmp_path: Path, uninterrupted: tuple[torch.nn.Module, Path]
) -> None:
    shutil.copytree(uninterrupted[1], tmp_path, dirs_exist_ok=True)
    again, result = run(tmp_path)
    assert same(again, uninterrupted[0])
    assert (result.steps, result.resumed_from) == (6, 6)
    assert result.loss == metrics(tmp_path)[-1]["loss"]


def test_a_run_with_a_constant_rate_can_be_prolonged(
    tmp_path: Path, uninterrupted: tuple[torch.nn.Module, Path]
) -> None:
    run(tmp_path, replace(SMALL, steps=3))
    resumed, result = run(tmp_path)
    assert result.resumed_from == 3
    assert same(resumed, uninterrupted[0])


def test_start_over(tmp_path: Path, uninterrupted: tuple[torch.nn.Module, Path]) -> None:
    run(tmp_path, replace(SMALL, seed=1))
    net, result = run(tmp_path, resume=False)
    assert result.resumed_from == 0
    assert same(net, uninterrupted[0])
    assert len(metrics(tmp_path)) == 6


def test_only_the_latest_checkpoints_are_kept(uninterrupted: tuple[torch.nn.Module, Path]) -> None:
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
    uninterrupted: tuple[torch.nn.Module, Path],
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


def test_what_was_half_written_is_never_read(
    tmp_path: Path, uninterrupted: tuple[torch.nn.Module, Path]
) -> None:
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
        ({"rank": 8}, "adapter rank = 4, and now it is 8"),
        ({"format": "fp4"}, "adapter format = 'nf4', and now it is 'fp4'"),
        ({"data": tiny.examples(11)}, "data examples = 12, and now it is 11"),
        ({"data": tiny.examples(12, seed=5)}, "data sha256"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    uninterrupted: tuple[torch.nn.Module, Path], change: dict[str, Any], message: str
) -> None:
    config = change.pop("config", SMALL)
    data = change.pop("data", tiny.examples())
    net = model(**{"dropout": 0.1} | change)
    with pytest.raises(ValueError, match=message):
        train(net, data, config, uninterrupted[1], progress=False)


# Mistakes


def test_a_loss_that_is_not_finite_stops_before_the_adapters_are_spoilt(tmp_path: Path) -> None:
    net = model()
    net.lm_head.weight.data[20] = math.nan
    before = [p.clone() for p in adapter_parameters(net).values()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train(net, tiny.examples(), SMALL, tmp_path, progress=False)
    for was, parameter in zip(before, adapter_parameters(net).values(), strict=True):
        assert torch.equal(was, parameter)


def test_what_cannot_be_trained_is_named(tmp_path: Path) -> None:
    def attempt(net: torch.nn.Module, data: Any) -> None:
        train(net, data, replace(SMALL, max_length=20), tmp_path, progress=False)

    with pytest.raises(ValueError, match="call quantize_model"):
        attempt(tiny.llama(), tiny.examples())
    unfrozen = model()
    unfrozen.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 other parameters .*model\.norm\.weight"):
        attempt(unfrozen, tiny.examples())
    frozen = model().requires_grad_(False)
    with pytest.raises(ValueError, match="call quantize_model"):
        attempt(frozen, tiny.examples())
    with pytest.raises(ValueError, match="dataset must have at least one example"):
        attempt(model(), [])
    with pytest.raises(TypeError, match="dataset must hold Examples, item 0 is a dict"):
        attempt(model(), [{"input_ids": [1, 2]}])
    long = Example(torch.ones(21, dtype=torch.long), torch.ones(21, dtype=torch.long))
    with pytest.raises(ValueError, match="example 0 has 21 tokens, more than max_length = 20"):
        attempt(model(), [long])
    masked = Example(torch.ones(3, dtype=torch.long), torch.full((3,), IGNORE))
    with pytest.raises(ValueError, match="example 0 has no token to learn"):
        attempt(model(), [masked])
    with pytest.raises(ValueError, match="data must have at least one token to predict"):
        evaluate(tiny.llama(), [])


def test_evaluation_takes_batches_and_leaves_the_model_as_it_was() -> None:
    net, data = tiny.llama(), tiny.examples()
    net.train()
    net.lm_head.eval()
    ready = evaluate(net, [collate(data[:5]), collate(data[5:])])
    assert ready.nll == pytest.approx(evaluate(net, data, batch_size=3).nll, rel=1e-6)
    assert {name for name, m in net.named_modules() if not m.training} == {"lm_head"}
    unpadded = {"input_ids": tiny.tokens(), "labels": tiny.tokens()}
    assert evaluate(net, [unpadded]).tokens == 2 * 11


def test_progress_without_tqdm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    run(tmp_path, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("train: 6/6")
    assert "loss" in lines[-1]
