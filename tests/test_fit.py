"""Which cards a plan fits, and what is changed where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from transformers import Llama4TextConfig

from qlora import QLoRAConfig, fit
from qlora.fit import CARDS, GIB, RESERVE, Option, cards, improvements, report
from qlora.memory import MemoryPlan, plan_memory
from qlora.recipe import TrainConfig
from tests import tiny

LORA = QLoRAConfig(rank=32)
RECIPE = TrainConfig(micro_batch_size=2, max_length=128)


def small(**settings: int) -> Any:
    return tiny.llama(max_position_embeddings=512, **settings).config


def wanted(config: Any, lora: QLoRAConfig, train: TrainConfig) -> Option:
    return Option((), lora, train, plan_memory(config, lora, train))


def test_changes_come_on_top_of_each_other_and_each_saves_memory() -> None:
    config = small(num_hidden_layers=4)
    train = TrainConfig(micro_batch_size=4, gradient_checkpointing=False)
    start = wanted(config, LORA, train)
    found = list(improvements(config, start))
    assert [option.flags[-1] for option in found] == [
        "--gradient-checkpointing",
        "--adapter-dtype bfloat16",
        "--batch 1 --accumulation 64",
        "--optimizer paged_adamw_8bit",
        "--offload-checkpoints",
        "--rank 16",
        "--length 256",
    ]
    assert [len(option.flags) for option in found] == list(range(1, 8))
    totals = [option.plan.total for option in (start, *found)]
    assert totals == sorted(set(totals), reverse=True)
    last = found[-1]
    assert (last.lora.rank, last.lora.adapter_dtype) == (16, "bfloat16")
    assert last.train.batch_size == train.batch_size
    assert plan_memory(config, last.lora, last.train) == last.plan


def test_a_change_that_takes_more_memory_is_passed_over() -> None:
    """Gradients that must last over micro-batches may outweigh the activations of a larger one."""
    lora = QLoRAConfig(rank=256)
    train = replace(RECIPE, gradient_accumulation_steps=1, max_length=16)
    config = small(num_hidden_layers=8)
    found = improvements(config, wanted(config, lora, train))
    assert not any("--batch" in flag for option in found for flag in option.flags)


def test_what_is_small_already_is_left_out() -> None:
    lora = QLoRAConfig(rank=8, adapter_dtype="bfloat16")
    train = TrainConfig(optimizer="paged_adamw_8bit", offload_checkpoints=True, max_length=256)
    assert list(improvements(small(), wanted(small(), lora, train))) == []


def test_the_table_shows_both_ways_and_adds_up() -> None:
    text, *_ = report(small(), LORA, replace(RECIPE, offload_checkpoints=True))
    rows = [line.rsplit(maxsplit=4)[1::2] for line in text.splitlines()[2:]]
    numbers = [[int(cell.replace(",", "")) for cell in row] for row in rows]
    assert len(numbers) == len(fields(MemoryPlan)) + 1
    for *parts, total in zip(*numbers, strict=True):
        assert sum(parts) == total
    plan = plan_memory(small(), LORA, replace(RECIPE, gradient_checkpointing=False))
    assert numbers[-1][1] == plan.total


def test_experts_that_stay_dense_are_pointed_out() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = Llama4TextConfig(**sizes, **heads, num_local_experts=4, pad_token_id=0)
    _, said, _ = report(experts, LORA, RECIPE)
    assert said.startswith("Left dense, as they are no linear layers: model.layers.*.feed_forward.")
    assert len(list(report(experts, QLoRAConfig(format=None), RECIPE))) == 2


def test_an_embedding_is_no_news() -> None:
    assert len(list(report(small(vocab_size=50_000), LORA, RECIPE))) == 2


def _plan(total: float, optimizer: float = 0.0) -> MemoryPlan:
    """A plan of GiB in all."""
    return MemoryPlan(int((total - optimizer) * GIB), 0, 0, 0, 0, int(optimizer * GIB), 0, 0)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is said of each card, where each change leads to the next of the plans, and the last stays."""

    def ask(*plans: MemoryPlan, train: TrainConfig = RECIPE) -> list[str]:
        waiting = list(plans[1:])
        last = plans[-1]
        monkeypatch.setattr(fit, "plan_memory", lambda *_: waiting.pop(0) if waiting else last)
        lines = list(cards(small(), Option((), LORA, train, plans[0])))[1:]
        assert [line.split()[:2] for line in lines] == [[str(card), "GiB"] for card in CARDS]
        return [line.split(maxsplit=2)[2] for line in lines]

    return ask


def test_a_card_that_is_large_enough(answers: Callable[..., list[str]]) -> None:
    assert RESERVE == GIB
    said = answers(_plan(23.5, 2), _plan(60))
    assert said[3:] == [f"fits, {room} GiB to spare" for room in ("23.5", "55.5", "116.5")]
    assert said[2] == "fits, 0.5 GiB of optimizer states paged out to the host"


def test_too_small_is_said_of_what_cannot_be_paged(answers: Callable[..., list[str]]) -> None:
    assert answers(_plan(23.5, 2))[0] == "too small: 22.5 GiB are needed; take a smaller model"


def test_what_to_change_comes_in_order(answers: Callable[..., list[str]]) -> None:
    said = answers(_plan(30), _plan(20), _plan(12), _plan(6.5))
    assert said[2] == "with --adapter-dtype bfloat16, 3.0 GiB to spare"
    two = "with --adapter-dtype bfloat16 --batch 1 --accumulation 32"
    assert said[1] == f"{two}, 3.0 GiB to spare"
    assert said[0] == f"{two} --optimizer paged_adamw_8bit, 0.5 GiB to spare"


def test_only_paged_states_make_room(answers: Callable[..., list[str]]) -> None:
    assert answers(_plan(8, 4))[0] == "fits, 1.0 GiB of optimizer states paged out to the host"
    plain = replace(RECIPE, optimizer="adamw_torch")
    assert answers(_plan(8, 4), _plan(6), train=plain)[0].startswith("with --adapter-dtype")
