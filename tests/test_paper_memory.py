"""Figure 6's experiment: a real step of a small LLaMA on the CPU, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from paper_repro import lora_inputs, memory, one_step
from paper_repro.__main__ import main
from paper_repro.lab import Lab
from qlora import shapes
from qlora.memory import CUBLAS_WORKSPACE, plan_memory
from tests import paper

NAME = "llama-7b"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    paper.shrink_llama(monkeypatch)


@pytest.mark.usefixtures("small")
def test_a_step_takes_what_was_planned() -> None:
    result = one_step.run(NAME, torch.device("cpu"))
    assert [step["layers"] for step in result["steps"]] == list(one_step.DEPTHS)
    for step in result["steps"]:
        assert step["peak_bytes"] == pytest.approx(
            step["planned_bytes"] - CUBLAS_WORKSPACE, rel=0.005
        )
        assert step["resident_bytes"] > step["peak_bytes"]
        assert 8 < step["loss"] < 13  # log 32000 = 10.4: random weights know nothing
    planned = plan_memory(shapes.model_config(NAME), one_step.LORA, one_step.RECIPE)
    assert result["planned_bytes"] == planned.total
    assert result["peak_bytes"] == pytest.approx(planned.total - CUBLAS_WORKSPACE, rel=0.005)
    assert not result["on_gpu"]


def test_depth_is_taken_from_the_planner() -> None:
    steps = [
        {"layers": 1, "peak_bytes": 100, "planned_bytes": 110},
        {"layers": 3, "peak_bytes": 300, "planned_bytes": 310},
    ]
    assert one_step.at_depth(steps, 8010) == 8000


@pytest.mark.usefixtures("small")
def test_the_weights_are_random_and_all_there() -> None:
    model = one_step.random_model(shapes.model_config(NAME, 1), torch.device("cpu"))
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    assert not any(tensor.is_meta for tensor in tensors.values())
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    projection = model.model.layers[0].self_attn.q_proj.base_weight()
    assert projection.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.usefixtures("small")
def test_adapters_inputs_at_once() -> None:
    """Without checkpointing those of all layers, with it those of one: q, k, v share one, gate and up too."""
    config = shapes.model_config(NAME)
    hidden, layers, _, feed_forward = paper.LLAMA[NAME]
    one = 512 * (3 * hidden + feed_forward) * 2
    assert lora_inputs.at_once(config, checkpointing=False) == layers * one
    assert lora_inputs.at_once(config, checkpointing=True) == one


@pytest.mark.usefixtures("small")
def test_a_run_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "OUT", tmp_path)
    lab = Lab(tmp_path / "cache")
    assert memory.run(lab)["runs"] == {}
    path = memory.take_step("7b")
    assert json.loads(path.read_text())["measured_on"]["commit"]
    result = memory.run(lab)
    totals = [memory._total(result["models"][size]) for size in memory.FIGURE6]
    assert totals == sorted(set(totals)), "each size is planned, and with its own shapes"
    assert memory.section(result).count("extrapolated)") == 1
    assert "with other code" not in memory.section(result)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "another"}))
    assert "with other code" in memory.section(memory.run(lab))


def test_a_gpus_run_is_preferred(tmp_path: Path) -> None:
    for kind in ("cpu", "cuda"):
        run = {"code": "", "steps": [], "on_gpu": kind == "cuda"}
        (tmp_path / f"memory-run-65b-{kind}.json").write_text(json.dumps(run))
    assert memory._runs(tmp_path)["65b"]["on_gpu"]


def test_run_goes_with_memory_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for names in ([], ["bits"], ["memory", "bits"]):
        assert main([*names, "--run"]) == 2
        assert "--run goes with the experiment memory alone" in capsys.readouterr().err
