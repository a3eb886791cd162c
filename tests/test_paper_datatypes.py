"""The data types' values from their definitions, and how their errors on weights are put together."""

from __future__ import annotations

import pytest
import torch

from paper_repro import datatypes
from paper_repro.harness.lab import Lab
from paper_repro.materials import weights
from paper_repro.measures.quantiles import equation_4, nf4_from_quantiles
from qlora.kernels.formats import FORMATS
from tests.paper_results import datatypes as results


def test_nf4_follows_from_normal_quantiles() -> None:
    assert nf4_from_quantiles() == pytest.approx(sorted(FORMATS["nf4"].values), abs=1e-6)


def test_equation_4_gives_15_symmetric_values() -> None:
    values = equation_4()
    assert len(values) == 15
    assert values == pytest.approx([-value for value in reversed(values)], abs=1e-12)
    assert values[-1] == 1
    (sentence,) = datatypes.errata(results.passing())
    assert "15 finite symmetric values" in sentence


def test_errors_of_matrices_are_pooled_by_their_squares() -> None:
    result = results.passing()
    small, large = result["weights"]["minilm"].values()
    error = small["mse"]["nf4"] * 4096 + large["mse"]["nf4"] * 8192
    square = small["mean_square"] * 4096 + large["mean_square"] * 8192
    assert datatypes._rmse(result, "minilm", "nf4") == pytest.approx((error / square) ** 0.5)


def test_matrices_in_which_nf4_is_best_are_counted() -> None:
    result = results.passing()
    assert datatypes.show_best(result, "own") == "2 of 2"
    result["weights"]["own"]["a"]["mse"]["int4"] = 1e-9
    assert datatypes.show_best(result, "own") == "1 of 2"


def test_errors_are_measured_on_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(64, 128, generator=generator) for name in "ab"}
    monkeypatch.setattr(weights, "linear_weights", lambda lab, name: found)
    measured = datatypes._on_weights(Lab(), "minilm")
    assert list(measured) == ["a", "b"]
    of_b = measured["b"]
    assert of_b["numel"] == 64 * 128
    assert of_b["mean_square"] == pytest.approx(found["b"].square().mean().item(), rel=1e-6)
    assert of_b["mse"]["nf4"] == pytest.approx(0.0085, rel=0.1)
    assert set(of_b["mse"]) == set(datatypes.WITH_DQ)
