"""The paged optimizer's page in paper_repro: what is compared, one after the other, and what a small GPU leaves."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from paper_repro import paged
from paper_repro.harness.experiment import NOT_RUN
from paper_repro.harness.room import where_it_fits
from paper_repro.measures import paged_steps
from qlora import PagedAdamW
from tests.paper import LLAMA, pretended_gpu, shrink_llama
from tests.paper_results import paged as paged_result

SIZES = [torch.Size((3, 5)), torch.Size((7,))]


def test_adapters_of_one_block_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_llama(monkeypatch)
    width, _, _, ffn = LLAMA["llama-7b"]
    expected = paged.RANK * (4 * 2 * width + 3 * (width + ffn))
    assert sum(size.numel() for size in paged.adapter_shapes(1)) == expected


def test_without_a_gpu_nothing_is_said_of_paging() -> None:
    result = paged_result.passing() | {"gpu": None}
    verdicts = [claim.verdict(result) for claim in paged.CLAIMS]
    assert [verdict == NOT_RUN for verdict in verdicts] == [True, False, True, True, False]
    assert all("GPU" in c.measured(result) for c in paged.CLAIMS if c.verdict(result) == NOT_RUN)
    assert "nothing can be said" in paged.section(result)


def test_paged_and_regular_states_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = paged_steps.compare(SIZES, 3, torch.device("cpu"))
    assert found["identical"]
    assert 0 < found["errors"]["torch"] < 1e-4
    assert found["errors"]["ours"] < 1e-4

    def lose(optimizer: PagedAdamW) -> None:
        if optimizer.paged:
            for parameter in optimizer.param_groups[0]["params"]:
                optimizer.state[parameter]["exp_avg"].zero_()

    monkeypatch.setattr(PagedAdamW, "evict", lose)
    found = paged_steps.compare(SIZES, 3, torch.device("cpu"))
    assert not found["identical"]
    assert found["errors"]["ours"] > 1e-2


def test_one_optimizer_at_a_time_has_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    start = torch.optim.Optimizer.__init__

    def watched(self: torch.optim.Optimizer, *given: Any) -> None:
        assert all(reference() is None for reference in made)
        made.append(weakref.ref(self))
        start(self, *given)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", watched)
    paged_steps.compare(SIZES, 2, torch.device("cpu"))
    assert len(made) == 4


def test_paged_and_regular_steps_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(paged_steps, "_makes_room", lambda optimizer: optimizer.paged)
    found = paged_steps.on_gpu(SIZES, 4, torch.device("cpu"))
    assert {name: len(own) for name, own in found["seconds"].items()} == {"paged": 4, "regular": 4}
    assert found["makes_room"]


def test_a_gpu_that_is_too_small_leaves_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(sizes: list[torch.Size], steps: int, device: torch.device) -> dict[str, Any]:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"identical": True, "errors": {"ours": 1.0, "torch": 1.0}}

    shrink_llama(monkeypatch)
    monkeypatch.setattr(paged_steps, "compare", compare)
    result = paged.run(pretended_gpu(tmp_path))
    assert result["gpu"] is None
    assert result["parameters"] == sum(size.numel() for size in paged.adapter_shapes(1))
    assert "does not fit on this GPU" in capsys.readouterr().out


def test_what_fits_is_measured() -> None:
    assert where_it_fits("It", lambda: 3) == 3
