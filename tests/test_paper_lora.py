"""LoRA's sizes and latency, and Guanaco's recipe in paper_repro: counts by hand, and what runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paper_repro import guanaco, latency
from paper_repro.measures import forward_times, gpt2, lora_shapes, small_llama
from paper_repro.measures.gpt2 import ADAPTER_H, ADAPTER_L, BASE, MERGED, UNMERGED
from paper_repro.measures.lora_shapes import SHAPES
from qlora import __main__ as command_line
from qlora import commands
from qlora.config import QLoRAConfig
from qlora.recipe import TrainConfig
from tests.paper import pretended_gpu, shrink_llama
from tests.paper_results import latency as latency_result
from tests.tiny import llama, model_folder

INNER = {ADAPTER_L: 6, ADAPTER_H: 3}
WIDTH, LAYERS = 32, 2


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return gpt2.contenders(LAYERS, WIDTH, heads=2, context=16, rank=4, inner=INNER)


@torch.inference_mode()
def answer(model: nn.Module) -> Tensor:
    return model(torch.arange(12)[None]).logits


# --- Sizes --------------------------------------------------------------------------------------------


def test_q_k_v_in_one_matrix_count_as_q_and_v_apart() -> None:
    fused = replace(SHAPES["GPT-2 M"], rank=8, sizes={"n_embd": 1024, "n_layer": 24, "n_head": 16})
    assert lora_shapes.adapted(fused)[1] == 24 * 8 * (1024 + 3 * 1024)
    assert lora_shapes.adapted(SHAPES["RoBERTa large"])[1] == 24 * 2 * 2 * 1024 * 8
    assert lora_shapes.adapted(fused)[1] == lora_shapes.adapted(SHAPES["RoBERTa large"])[1]


@pytest.mark.parametrize("targets", lora_shapes.LLAMA_TARGETS.values())
def test_adapters_grow_with_the_rank(
    targets: lora_shapes.Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_llama(monkeypatch)
    one, eight = (lora_shapes.llama_adapter("7b", targets, rank) for rank in (1, 8))
    assert eight == 8 * one


def test_bytes_of_a_step_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    counters = 3 * 4
    full = {"weights": 120, "gradients": 120, "optimizer": 240 + counters}
    assert lora_shapes.step_bytes(model) == full
    model[0].requires_grad_(False)
    part = {"weights": 120, "gradients": 40, "optimizer": 80 + 4}
    assert lora_shapes.step_bytes(model) == part


def test_adapters_that_are_written_are_those_that_are_meant(tmp_path: Path) -> None:
    found = lora_shapes.write(model_folder(tmp_path / "model"))
    width, kv, ffn, layers = 64, 32, 96, 2
    q_and_v = layers * 4 * (width + width + width + kv)
    linear = layers * (4 * width + 2 * (width + kv) + 3 * (width + ffn))
    parameters = [adapter["parameters"] for adapter in found["adapters"].values()]
    assert parameters == [q_and_v, 16 * linear, 64 * linear]
    assert found["model_parameters"] == sum(p.numel() for p in llama().parameters())
    for adapter in found["adapters"].values():
        assert 2 * adapter["parameters"] < adapter["weights_bytes"] < adapter["folder_bytes"]


# --- Latency ------------------------------------------------------------------------------------------


def test_merged_is_the_base_with_other_values(models: dict[str, nn.Module]) -> None:
    torch.testing.assert_close(answer(models[MERGED]), answer(models[UNMERGED]))
    assert (answer(models[MERGED]) - answer(models[BASE])).abs().max() > 1e-3
    assert gpt2.layout(models[MERGED]) == gpt2.layout(models[BASE])
    assert gpt2.layout(models[UNMERGED]) != gpt2.layout(models[BASE])


@pytest.mark.parametrize(("name", "in_a_block"), [(ADAPTER_L, 1), (ADAPTER_H, 2)])
def test_serial_adapters_are_in_the_forward_path(
    models: dict[str, nn.Module], name: str, in_a_block: int
) -> None:
    passed = []
    bottlenecks = [m for m in models[name].modules() if isinstance(m, gpt2.Bottleneck)]
    hooks = [
        each.register_forward_hook(lambda own, inputs, output: passed.append(output.shape))
        for each in bottlenecks
    ]
    changed = answer(models[name])
    for hook in hooks:
        hook.remove()
    assert passed == [(1, 12, WIDTH)] * (LAYERS * in_a_block)
    assert (changed - answer(models[BASE])).abs().max() > 1e-3
    before = [each.up.state_dict() for each in bottlenecks]
    before = [{n: value.clone() for n, value in state.items()} for state in before]
    for each in bottlenecks:  # which then add nothing
        nn.init.zeros_(each.up.weight)
        nn.init.zeros_(each.up.bias)
    torch.testing.assert_close(answer(models[name]), answer(models[BASE]))
    for each, state in zip(bottlenecks, before, strict=True):
        each.up.load_state_dict(state)


def test_added_parameters_by_hand(models: dict[str, nn.Module]) -> None:
    added = {name: gpt2.added_parameters(model, models[BASE]) for name, model in models.items()}
    one = {name: 2 * WIDTH * inner + inner + WIDTH for name, inner in INNER.items()}
    assert added == {
        BASE: 0,
        MERGED: 0,
        UNMERGED: LAYERS * 4 * 4 * WIDTH,
        ADAPTER_L: LAYERS * (one[ADAPTER_L] + 2 * WIDTH),
        ADAPTER_H: LAYERS * 2 * one[ADAPTER_H],
    }


def test_models_take_turns(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {id(model): name for name, model in models.items()}
    turns: list[str] = []

    def seconds(model: nn.Module, ids: Tensor) -> float:
        assert torch.get_num_threads() == 1
        turns.append(names[id(model)])
        return float(len(turns))

    monkeypatch.setattr(forward_times, "_seconds", seconds)
    threads = torch.get_num_threads()
    found = forward_times.measure(models, batch=1, length=8, rounds=5, device=torch.device("cpu"))
    assert torch.get_num_threads() == threads
    for place in range(5):
        assert {turns[5 * turn + place] for turn in range(5)} == set(models)
    assert all(len(own) == 5 for own in found["seconds"].values())
    assert found["apart"] < 1e-5 < found["adapted"]


def test_answers_are_compared_on_one_row(models: dict[str, nn.Module]) -> None:
    rows: list[int] = []
    hooks = [
        model.register_forward_pre_hook(lambda own, inputs: rows.append(len(inputs[0])))
        for model in models.values()
    ]
    forward_times.measure(models, batch=3, length=8, rounds=1, device=torch.device("cpu"))
    for hook in hooks:
        hook.remove()
    assert rows == [1] * 5 + [3] * 5 + [3] * 5


@pytest.mark.parametrize("fits", [("1/128", "16/256"), ()])
def test_what_does_not_fit_on_the_gpu_is_left_out(
    fits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point = latency_result.passing()["points"][latency.JUDGED]
    on_gpu = [latency.POINTS[name][:2] for name in fits]

    def measure(models: object, batch: int, length: int, rounds: int, device: torch.device) -> dict:
        if device.type == "cuda" and (batch, length) not in on_gpu:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {**point, "on": device.type, "rounds": rounds}

    monkeypatch.setattr(gpt2, "contenders", lambda **sizes: {})
    monkeypatch.setattr(forward_times, "measure", measure)
    result = latency.run(pretended_gpu(tmp_path))
    assert result["on_gpu"] == bool(fits)
    assert set(result["points"]) == set(fits or [latency.JUDGED])
    judged = result["points"][latency.JUDGED]
    assert (judged["on"], judged["rounds"]) == (("cuda", 100) if fits else ("cpu", 6))
    left_out = "32/512 (too large for this GPU)" if fits else "16/256, 32/512 (minutes"
    assert f"Not run here: {left_out}" in latency.section(result)


def test_what_a_model_adds_is_the_median_of_pairs() -> None:
    point = {"seconds": {BASE: [1.0, 2.0, 4.0], MERGED: [1.1, 2.4, 4.8]}}
    found = latency.slower(point, MERGED)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.2)
    assert latency.slower(point, BASE).low == 0


def test_a_pass_takes_time(models: dict[str, nn.Module]) -> None:
    assert forward_times._seconds(models[BASE], torch.arange(8)[None]) > 0


# --- Guanaco ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", guanaco.BY_SIZE)
def test_the_command_has_the_settings_that_are_planned(size: str) -> None:
    words = guanaco.command(size).split()
    args = command_line._parser().parse_args(words[1:])
    assert words[0] == "qlora"
    assert args.run is commands.finetune
    lora, training = guanaco.settings(size)
    assert QLoRAConfig(**commands._given(args, QLoRAConfig)) == lora
    assert TrainConfig(**commands._given(args, TrainConfig)) == training
    assert lora.dropout == guanaco.BY_SIZE[size]["dropout"]
    assert training.learning_rate == guanaco.BY_SIZE[size]["learning_rate"]


def test_a_small_run_trains_saves_and_loads() -> None:
    adapter, training = guanaco.settings("7b")
    sizes = guanaco.TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    training = replace(training, steps=2, gradient_accumulation_steps=3, max_length=32)
    runs = [
        small_llama.run(sizes, adapter, replace(training, seed=seed), torch.device("cpu"))
        for seed in (0, 0, 1)
    ]
    assert runs[0]["apart"] <= guanaco.SAME < runs[0]["learned"]
    assert runs[0]["parameters"] == adapter.rank * (4 * 2 * 64 + 3 * (64 + 96))
    losses = [[step["loss"] for step in run["metrics"]] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_states_that_are_paged_out_make_a_model_fit() -> None:
    gib = 2**30
    result = {"plans": {"33b": {"total": 25 * gib, "optimizer": 5 * gib}}}
    assert guanaco._fits(result, "33b", 48) == "yes"
    assert guanaco._fits(result, "33b", 24) == "2.0 GiB paged out"
    assert guanaco._fits(result, "33b", 16) == "no"
