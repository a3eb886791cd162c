"""Which cards a plan fits, and what is changed where it does not."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest

from qlora import QLoRAConfig, fit
from qlora.fit import CARDS, GIB, RESERVE, cards, options, table
from qlora.memory import MemoryPlan, plan_memory
from qlora.recipe import TrainConfig
from tests import tiny

LORA = QLoRAConfig(rank=32)
RECIPE = TrainConfig(micro_batch_size=2, max_length=128)


def test_changes_come_on_top_of_each_other() -> None:
    found = options(QLoRAConfig(), TrainConfig(micro_batch_size=4, gradient_checkpointing=False))
    assert [option.flags[-1:] for option in found] == [
        (),
        ("--gradient-checkpointing",),
        ("--adapter-dtype bfloat16",),
        ("--batch 1",),
        ("--optimizer paged_adamw_8bit",),
        ("--offload-checkpoints",),
        ("--rank 16",),
        ("--length 256",),
    ]
    assert found[-1].lora == QLoRAConfig(rank=16, adapter_dtype="bfloat16")
    assert found[3].train.batch_size == found[0].train.batch_size == 64
    assert [len(option.flags) for option in found] == list(range(8))


def test_what_is_small_already_is_left_out() -> None:
    lora = QLoRAConfig(rank=8, adapter_dtype="bfloat16")
    train = TrainConfig(optimizer="paged_adamw_8bit", offload_checkpoints=True, max_length=256)
    assert len(options(lora, train)) == 1


def test_each_change_saves_memory() -> None:
    config = tiny.llama(num_hidden_layers=4, max_position_embeddings=512).config
    train = TrainConfig(micro_batch_size=2, gradient_checkpointing=False)
    plans = [plan_memory(config, o.lora, o.train).total for o in options(LORA, train)]
    assert plans == sorted(plans, reverse=True)
    assert len(set(plans)) == len(plans)


def test_the_table_adds_up() -> None:
    lines = table(tiny.llama().config, LORA, RECIPE).splitlines()
    rows = [
        [int(n.replace(",", "")) for n in re.findall(r"[\d,]{2,}(?= )", line)] for line in lines
    ]
    rows = [row for row in rows[2:] if row]
    plan = plan_memory(tiny.llama().config, LORA, RECIPE)
    assert len(lines) == 2 + len(fields(MemoryPlan)) + 1
    assert lines[-1].split()[-4].replace(",", "") == str(plan.total)


def _plan(total: float, optimizer: float = 0.0) -> MemoryPlan:
    """A plan of GiB in all."""
    return MemoryPlan(int((total - optimizer) * GIB), 0, 0, 0, 0, int(optimizer * GIB), 0, 0)


def _answers(monkeypatch: pytest.MonkeyPatch, *plans: MemoryPlan) -> list[str]:
    """The lines of the cards, where each change leads to the next of the plans, and the last stays."""
    waiting = list(plans)
    monkeypatch.setattr(
        fit, "plan_memory", lambda *_: waiting.pop(0) if len(waiting) > 1 else waiting[0]
    )
    lines = cards(tiny.llama().config, LORA, RECIPE).splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [[str(card), "GiB"] for card in CARDS]
    return [line.split(maxsplit=2)[2] for line in lines]


def test_a_card_that_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RESERVE == GIB
    answers = _answers(monkeypatch, _plan(23.5, 2), _plan(60))
    assert answers[3:] == [f"fits, {room} GiB to spare" for room in ("23.5", "55.5", "116.5")]
    assert answers[2] == "fits, 0.5 GiB of optimizer states paged out to the host"
    assert answers[0].startswith("too small: 61.0 GiB with all that could be changed")


def test_what_to_change_comes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = _answers(monkeypatch, _plan(30), _plan(20), _plan(12), _plan(6.5))
    assert answers[2] == "with --adapter-dtype bfloat16, 3.0 GiB to spare"
    assert answers[1] == "with --adapter-dtype bfloat16 --batch 1, 3.0 GiB to spare"
    assert answers[0].startswith(
        "with --adapter-dtype bfloat16 --batch 1 --optimizer paged_adamw_8bit,"
    )


def test_only_paged_states_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "plan_memory", lambda *_: _plan(8, 4))
    config = tiny.llama().config
    assert "8 GiB  fits, 1.0 GiB of" in cards(config, LORA, RECIPE)
    plain = replace(RECIPE, optimizer="adamw_torch")
    assert "8 GiB  with --adapter-dtype bfloat16 --batch 1 --optimizer" in cards(
        config, LORA, plain
    )
