"""Adapters of experts in PEFT's layout: the factors of each expert, and the real peft both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qlora
from qlora import QLoRAConfig
from qlora.experts import stack_sizes
from qlora.files import read_tensors
from qlora.peft_experts import stack, stacked_names, unstack
from tests import tiny
from tests.test_experts import Make, gpt_oss, mixtral, qwen3

IDS = tiny.tokens()
SIZES = {"0.experts.gate_up_proj": 3, "0.experts.down_proj": 3, "1.experts.down_proj": 2}


def factors(
    names: list[str], rank: int = 2, n: int = 4, k: int = 5
) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return {name: (torch.randn(rank, k), torch.randn(n, rank)) for name in names}


@given(
    experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    n=st.integers(1, 6),
    k=st.integers(1, 6),
    both=st.booleans(),
)
def test_what_is_stacked_comes_back(experts: int, rank: int, n: int, k: int, both: bool) -> None:
    sizes = {"m.experts.gate_up_proj": experts, "m.experts.down_proj": experts}
    projections = ["gate_up_proj", "down_proj"][: 1 + both]
    given = factors([f"m.experts.{p}.{i}" for p in projections for i in range(experts)], rank, n, k)
    tensors = stack(given, sizes)
    assert {key.rpartition(".lora_")[0] for key in tensors} == (
        {"m.experts", "m.experts.base_layer"} if both else {"m.experts"}
    )
    assert {tuple(t.shape) for t in tensors.values()} == {(rank * experts, k), (n, rank * experts)}
    back = unstack(tensors, projections, sizes)
    assert back.keys() == given.keys()
    for name, pair in given.items():
        assert all(map(torch.equal, pair, back[name]))


def test_the_layout() -> None:
    given = factors([f"0.experts.down_proj.{i}" for i in range(3)])
    tensors = stack(given, SIZES)
    a, b = tensors["0.experts.lora_A.weight"], tensors["0.experts.lora_B.weight"]
    for i in range(3):
        assert torch.equal(a[2 * i : 2 * i + 2], given[f"0.experts.down_proj.{i}"][0])
        assert torch.equal(b[:, i::3], given[f"0.experts.down_proj.{i}"][1])


def test_parameters_are_stacked_as_values() -> None:
    pair = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2))
    tensors = stack({"1.experts.down_proj.0": pair}, SIZES)
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_layers_that_are_no_experts_are_passed_over() -> None:
    given = factors(["1.experts.down_proj.1", "q_proj"])
    assert stacked_names(given, SIZES) == ["1.experts.down_proj"]
    tensors = stack(given, SIZES)
    assert sorted(tensors) == ["1.experts.lora_A.weight", "1.experts.lora_B.weight"]
    none, some = unstack(tensors, ["1.experts.down_proj"], SIZES).values()
    assert not none[0].any()
    assert not none[1].any()
    assert torch.equal(some[0], given["1.experts.down_proj.1"][0])
    assert stack(factors(["q_proj"]), SIZES) == {}


def test_experts_of_different_ranks_have_no_place() -> None:
    given = factors(["1.experts.down_proj.0"]) | factors(["1.experts.down_proj.1"], rank=3)
    with pytest.raises(ValueError, match=r"1\.experts\.down_proj: .* one rank .* got \[2, 3\]"):
        stack(given, SIZES)


@pytest.mark.parametrize(
    ("change", "parameters", "message"),
    [
        ({}, ["up_proj"], "no experts 'up_proj'; it has gate_up_proj, down_proj"),
        ({}, ["0.experts.down_proj"], r"0\.experts\.lora_A\.weight is missing"),
        (
            {"lora_A": torch.ones(3, 5)},
            ["down_proj"],
            r"\[r E, k\] and \[n, r E\] for E = 2 experts",
        ),
        ({"lora_A": torch.ones(4)}, ["down_proj"], r"got \(4,\) and \(4, 4\)"),
        (
            {"lora_A": torch.ones(3, 5), "lora_B": torch.ones(4, 3)},
            ["down_proj"],
            r"got \(3, 5\) and \(4, 3\)",
        ),
        ({"lora_B": torch.ones(4, 6)}, ["down_proj"], r"got \(4, 5\) and \(4, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor], parameters: list[str], message: str
) -> None:
    tensors = stack(factors(["1.experts.down_proj.0", "1.experts.down_proj.1"]), SIZES)
    tensors |= {f"1.experts.{factor}.weight": value for factor, value in change.items()}
    sizes = (
        SIZES if "0" in parameters[0] or parameters == ["up_proj"] else {"1.experts.down_proj": 2}
    )
    with pytest.raises(ValueError, match=message):
        unstack(tensors, parameters, sizes)


# --- The real peft ----------------------------------------------------------------------------------

TARGETS = (
    ["q_proj", "gate_up_proj", "down_proj"],
    ["mlp.experts.down_proj"],
    ["o_proj", "gate_up_proj"],
)


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_trained_here_answers_the_same_in_peft(
    make: Make, targets: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = tiny.adapted(make, format=None, target_modules=targets, rslora=True, dropout=0.1)
    qlora.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(make(), tmp_path)
    expected = tiny.logits(model.eval(), IDS)
    assert (expected - tiny.logits(make(), IDS)).abs().max() > 1e-2
    torch.testing.assert_close(tiny.logits(theirs, IDS), expected)
    again = tiny.quantized(make(), format=None, target_modules=targets, rslora=True, dropout=0.1)
    qlora.load_adapter(again, tmp_path)
    assert torch.equal(tiny.logits(again.eval(), IDS), expected)


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_trained_in_peft_answers_the_same_here(
    make: Make, targets: list[str], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=[name for name in targets if name in ("q_proj", "o_proj")],
        target_parameters=[name for name in targets if name not in ("q_proj", "o_proj")],
        rank_pattern={"down_proj": 2},
        init_lora_weights=False,
    )
    torch.manual_seed(4)
    theirs = get_peft_model(make(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = tiny.logits(theirs, IDS)
    theirs.save_pretrained(tmp_path)
    model = make()
    qlora.quantize_model(model, QLoRAConfig(format=None, target_modules=["gate_up_proj", "v_proj"]))
    qlora.load_adapter(model, tmp_path, "theirs")
    qlora.set_adapter(model, "theirs")
    torch.testing.assert_close(tiny.logits(model, IDS), expected)
    qlora.save_adapter(model, tmp_path / "ours", "theirs")
    for key, value in read_tensors(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(
            read_tensors(tmp_path / "ours" / "adapter_model.safetensors")[key], value
        )
    assert len(stack_sizes(model)) == 4
