"""The loop: what it learns and what it counts."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora.adapter_files import load_adapter
from qlora.adapters import adapter_parameters, enable_adapters
from qlora.batching import collate
from qlora.data import IGNORE, Example
from qlora.evaluation import evaluate, summed_loss
from qlora.paged import PagedAdamW
from qlora.recipe import OPTIMIZERS, TrainConfig, learning_rate
from qlora.train import make_optimizer, train, train_step
from tests import tiny
from tests.runs import SMALL, metrics, model, run, same

# Settings


def test_the_defaults_are_the_guanaco_recipe() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.schedule, config.warmup_steps) == (2e-4, "constant", 0)
    assert (config.batch_size, config.steps, config.max_length) == (16, 1875, 512)
    assert (config.beta1, config.beta2, config.weight_decay) == (0.9, 0.999, 0.0)
    assert config.max_grad_norm == 0.3
    assert config.group_by_length
    assert config.gradient_checkpointing
    assert config.optimizer == "paged_adamw_32bit"
    assert not config.stochastic_rounding
    assert not config.offload_checkpoints


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be finite and at least 1; got 0"),
        ({"steps": 1.5}, TypeError, "steps must be of type int; got 1.5"),
        ({"seed": True}, TypeError, "seed must be of type int"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must be finite"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be finite"),
        ({"beta2": 1.0}, ValueError, "beta2 must be below 1"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be above 0; got 0"),
        ({"seed": 2**63}, ValueError, r"seed must be at least 0 and below 2\*\*63; got 9223"),
        ({"schedule": "step"}, ValueError, "schedule must be one of constant, linear, cosine"),
        ({"precision": "int8"}, ValueError, "precision must be one of auto, bfloat16, float32"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be one of paged_adamw_32bit, paged_ad"),
        (
            {"optimizer": "adamw_torch", "stochastic_rounding": True},
            ValueError,
            "stochastic_rounding must be False with optimizer='adamw_torch'",
        ),
        (
            {"gradient_checkpointing": False, "offload_checkpoints": True},
            ValueError,
            "offload_checkpoints must be False without gradient_checkpointing",
        ),
        (
            {"loraplus_ratio": 0.5},
            ValueError,
            "loraplus_ratio must be finite and at least 1; got 0.5",
        ),
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


def test_the_optimizer_takes_each_step_with_the_settings_of_the_run() -> None:
    chosen = {"beta1": 0.5, "beta2": 0.75, "epsilon": 1e-3, "weight_decay": 0.25}
    config = replace(SMALL, schedule="linear", learning_rate=4e-3, steps=4, **chosen)
    net, seen = model(), []
    optimizer = make_optimizer(net, config)
    names = ("lr", "betas", "eps", "weight_decay")
    optimizer.register_step_pre_hook(
        lambda *_: seen.extend([group[name] for name in names] for group in optimizer.param_groups)
    )
    parameters, batch = list(adapter_parameters(net).values()), collate(tiny.examples(2))
    records = [train_step(net, optimizer, parameters, [batch], config, i) for i in range(4)]
    rates = [4e-3, 3e-3, 2e-3, 1e-3]
    assert seen == [[pytest.approx(rate), (0.5, 0.75), 1e-3, 0.25] for rate in rates]
    assert [record["lr"] for record in records] == pytest.approx(rates)


def test_lora_plus_moves_b_at_a_rate_of_its_own() -> None:
    config = replace(SMALL, schedule="linear", learning_rate=4e-3, steps=4, loraplus_ratio=16.0)
    net, seen = model(), []
    optimizer = make_optimizer(net, config)
    names = {parameter: name for name, parameter in net.named_parameters()}
    factors = [{names[p].rpartition(".")[2] for p in g["params"]} for g in optimizer.param_groups]
    assert factors == [{"lora_a"}, {"lora_b"}]
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    parameters, batch = list(adapter_parameters(net).values()), collate(tiny.examples(2))
    records = [train_step(net, optimizer, parameters, [batch], config, i) for i in range(4)]
    rates = [4e-3, 3e-3, 2e-3, 1e-3]
    assert seen == [pytest.approx([rate, 16 * rate]) for rate in rates]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    assert len(make_optimizer(net, SMALL).param_groups) == 1


def test_each_step_has_a_dropout_of_its_own_and_always_the_same() -> None:
    config = replace(SMALL, learning_rate=0.0)
    net = tiny.randomize_adapter(model(dropout=0.5)).train()
    parameters, batch = list(adapter_parameters(net).values()), collate(tiny.examples(4))
    optimizer = make_optimizer(net, config)
    losses = [
        train_step(net, optimizer, parameters, [batch], recipe, step)["loss"]
        for recipe, step in ((config, 0), (config, 1), (replace(config, seed=1), 0), (config, 0))
    ]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3, "another step, and another seed, drop other values"


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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_the_same(tmp_path: Path, optimizer: str) -> None:
    config = replace(SMALL, steps=40, learning_rate=1e-2, checkpoint_every=0, optimizer=optimizer)
    run(tmp_path, config, dropout=0.0)
    losses = [record["loss"] for record in metrics(tmp_path)]
    run(tmp_path / "torch", replace(config, optimizer="adamw_torch"), dropout=0.0)
    reference = [record["loss"] for record in metrics(tmp_path / "torch")]
    assert losses[-1] < 0.4 * losses[0]
    tolerance = 0.2 if optimizer == "paged_adamw_8bit" else 1e-3
    assert losses == pytest.approx(reference, rel=tolerance)


def test_the_recipe_chooses_the_optimizer() -> None:
    chosen = {"optimizer": "paged_adamw_8bit", "stochastic_rounding": True}
    optimizer = make_optimizer(model(adapter_dtype="bfloat16"), replace(SMALL, **chosen))
    assert isinstance(optimizer, PagedAdamW)
    assert (optimizer.bits, optimizer.stochastic_rounding, optimizer.paged) == (8, True, True)
    optimizer = make_optimizer(model(), SMALL)
    assert (optimizer.bits, optimizer.stochastic_rounding) == (32, False)
    torchs = make_optimizer(model(), replace(SMALL, optimizer="adamw_torch"))
    assert type(torchs) is torch.optim.AdamW


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_adapters_learn_with_random_rounding(tmp_path: Path, precision: str) -> None:
    config = replace(
        SMALL, steps=40, learning_rate=1e-2, stochastic_rounding=True, precision=precision
    )
    net, _ = run(tmp_path, config, dropout=0.0, settings={"adapter_dtype": "bfloat16"})
    assert {p.dtype for p in adapter_parameters(net).values()} == {torch.bfloat16}
    losses = [record["loss"] for record in metrics(tmp_path)]
    assert losses[-1] < 0.4 * losses[0]


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


# Mistakes


def test_a_loss_that_is_not_finite_stops_before_the_adapters_are_spoilt(tmp_path: Path) -> None:
    net = model()
    net.lm_head.weight.data[20] = math.nan
    before = [p.clone() for p in adapter_parameters(net).values()]
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train(net, tiny.examples(), SMALL, tmp_path, progress=False)
    for was, parameter in zip(before, adapter_parameters(net).values(), strict=True):
        assert torch.equal(was, parameter)


def _example(length: int, token: int = 1) -> Example:
    return Example(torch.full((length,), token), torch.full((length,), token))


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
    with pytest.raises(ValueError, match="example 0 has 21 tokens, more than max_length = 20"):
        attempt(model(), [_example(21)])
    masked = Example(torch.ones(3, dtype=torch.long), torch.full((3,), IGNORE))
    with pytest.raises(ValueError, match="example 0 has no token to learn"):
        attempt(model(), [masked])
    silent = model()
    enable_adapters(silent, False)
    with pytest.raises(ValueError, match="adapters are switched off in 14 layers"):
        attempt(silent, tiny.examples())
    with pytest.raises(
        ValueError, match=r"max_length must be at most 16 for this model .*got .* 17"
    ):
        attempt(tiny.quantized(tiny.llama(max_position_embeddings=16)), [_example(17)])
    with pytest.raises(ValueError, match="got an example of 257 tokens"):
        train(model(), tiny.examples(), SMALL, tmp_path, eval_dataset=[_example(257)])
    with pytest.raises(ValueError, match=r"tokens must be below 258, .*embedding; got 258"):
        attempt(model(), [_example(3, token=258)])
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


def test_a_loss_too_large_for_a_perplexity_is_a_loss_still() -> None:
    net = tiny.llama()
    net.lm_head.weight.data *= 1e4
    result = evaluate(net, tiny.examples())
    assert 700 < result.nll < math.inf
    assert result.perplexity == math.inf


def test_what_cannot_be_evaluated_is_named() -> None:
    net, data = tiny.llama(max_position_embeddings=16), tiny.examples()
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        evaluate(net, data, batch_size=0)
    with pytest.raises(ValueError, match="max_length must be at most 16 for this model"):
        evaluate(net, [*data, _example(17)])
    with pytest.raises(ValueError, match="tokens must be below 258"):
        evaluate(net, [{"input_ids": tiny.tokens() + 258, "labels": tiny.tokens()}])
    net.lm_head.weight.data[20] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in batch 1 of 2"):
        evaluate(net, data)


def test_progress_without_tqdm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(tmp_path, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("train: 6/6")
    assert "loss" in lines[-1]
