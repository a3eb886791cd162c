"""Figure 6's experiment: a real step of a small LLaMA on the CPU, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paper_repro import figure6, memory
from paper_repro.__main__ import main
from paper_repro.harness.experiment import IN_TREND, NOT_REPRODUCED, NOT_RUN, REPRODUCED
from paper_repro.harness.lab import Lab
from paper_repro.measures import lora_inputs, one_step
from qlora import shapes
from qlora.memory import CUBLAS_WORKSPACE, plan_memory
from tests import paper
from tests.paper_results import memory as results

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


@pytest.mark.parametrize(("stats", "bytes"), [({}, 0), ({"requested_bytes.all.current": 5}, 5)])
def test_tensors_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, stats: dict[str, int], bytes: int
) -> None:
    """Torch has no statistics before it has been on the GPU."""
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    assert one_step._requested(torch.device("cuda")) == bytes
    assert one_step._requested(torch.device("cpu")) == 0


@pytest.mark.gpu
def test_a_model_takes_what_its_shapes_say() -> None:
    step = one_step._steps("llama-7b", 1, torch.device("cuda"))
    assert step["requested_bytes"] == pytest.approx(sum(step["static_bytes"].values()), abs=2**20)
    assert step["requested_bytes"] <= step["allocated_bytes"]


@pytest.mark.usefixtures("small")
def test_a_run_is_kept_and_shown(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "cache", tmp_path / "out")
    lab.device = torch.device("cpu")
    assert memory.run(lab)["runs"] == {}
    path = memory.take_step(lab, "7b")
    assert path.parent == lab.out
    assert json.loads(path.read_text())["measured_on"]["commit"]
    result = memory.run(lab)
    totals = [figure6.total(result["models"][size]) for size in figure6.FIGURE6]
    assert totals == sorted(set(totals)), "each size is planned, and with its own shapes"
    section = memory.EXPERIMENT.section
    assert section(result).count("extrapolated)") == 1
    assert "with other code" not in section(result)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "another"}))
    assert "with other code" in section(memory.run(lab))


def test_a_gpus_run_is_preferred(tmp_path: Path) -> None:
    for kind in ("cpu", "cuda"):
        run = {"code": "", "steps": [], "on_gpu": kind == "cuda"}
        (tmp_path / f"memory-run-65b-{kind}.json").write_text(json.dumps(run))
    assert memory._runs(tmp_path)["65b"]["on_gpu"]


@pytest.mark.usefixtures("small")
def test_a_full_run_on_a_gpu_takes_the_steps_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken, room = [], 24 * 2**30

    def step(name: str, device: torch.device) -> dict[str, Any]:
        taken.append(name)
        return {"on_gpu": True, "steps": [], "peak_bytes": 1, "depth": 2}

    plans = {"7b": 6, "13b": 10, "33b": 23, "65b": 44}  # GB
    planned = {"models": {size: {"weights": n * 10**9} for size, n in plans.items()}}
    monkeypatch.setattr(memory, "_plan", lambda: planned)
    monkeypatch.setattr(one_step, "run", step)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
    for full, kind, expected in (
        (False, "cuda", []),
        (True, "cpu", []),
        (True, "cuda", ["llama-7b", "llama-13b", "llama-33b"]),
        (True, "cuda", []),  # a second time, all are there
    ):
        lab = Lab(tmp_path / "cache", tmp_path / "out", full=full)
        lab.device = torch.device(kind)
        memory.run(lab)
        assert taken == expected
        taken.clear()


def test_run_goes_with_memory_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for names in ([], ["bits"], ["memory", "bits"]):
        with pytest.raises(SystemExit, match="2"):
            main([*names, "--run"])
        assert "--run goes with the experiment memory alone" in capsys.readouterr().err


# --- What is judged, by fixed results ---------------------------------------------------------------


def test_what_needs_a_gpu_is_not_run_without_one() -> None:
    result = results.passing()
    for run in result["runs"].values():
        run["on_gpu"] = False
    without = [IN_TREND, NOT_RUN, NOT_RUN, NOT_RUN, REPRODUCED, IN_TREND]
    assert [claim.verdict(result) for claim in memory.CLAIMS] == without
    assert figure6.section(result).count("extrapolated") == 4
    result["runs"] = {}
    assert [claim.verdict(result) for claim in memory.CLAIMS] == without
    assert "No step was run" in figure6.section(result)


def test_a_run_with_other_code_proves_nothing() -> None:
    result = results.passing()
    for run in result["runs"].values():
        run["is_stale"] = True
    assert [claim.verdict(result) for claim in memory.CLAIMS][1:4] == [NOT_RUN] * 3
    assert "with other code than this report's" in figure6.section(result)


def test_one_model_beyond_its_limit_is_enough() -> None:
    result, claim = results.passing(), memory.CLAIMS[1]
    del result["runs"]["33b"]
    assert claim.verdict(result) == NOT_RUN
    assert "44.30 GB; needs a GPU: `memory --model 33b --run`" in claim.measured(result)
    result["runs"]["65b"]["peak_bytes"] = 48 * 10**9
    assert claim.verdict(result) == NOT_REPRODUCED
