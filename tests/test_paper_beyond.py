"""beyond: errors and bits are those of the tensors, and the sentences follow the numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from paper_repro.beyond_errors import errors, scale_error
from paper_repro.beyond_lessons import errata, lessons
from paper_repro.beyond_plots import front
from paper_repro.beyond_shown import plots, section
from paper_repro.measures.in_data_type import DataType
from qlora import dequantize_4bit, quantize_4bit
from qlora.testing import relative_rmse
from tests.paper_results import beyond, change


def test_errors_are_those_of_all_weights_together() -> None:
    generator = torch.Generator().manual_seed(0)
    of = {name: torch.randn(64, 96, generator=generator) for name in "ab"}
    held = DataType("nf4", double_quant=True)
    found = errors(of, held)
    both = torch.stack(list(of.values()))
    restored = torch.stack([held.hold(weight) for weight in of.values()])
    assert found["rmse"] == pytest.approx(relative_rmse(restored, both), rel=1e-6)
    assert found["mse"] == pytest.approx((restored - both).square().mean().item(), rel=1e-5)
    assert found["mae"] == pytest.approx((restored - both).abs().mean().item(), rel=1e-5)
    assert found["bits"] == pytest.approx(quantize_4bit(of["a"]).bits_per_parameter)
    scaled = {name: 100 * weight for name, weight in of.items()}
    assert errors(scaled, held)["scaled_mae"] == pytest.approx(found["scaled_mae"], rel=1e-3)


def test_scaled_errors_of_a_block_of_zeros_are_zero() -> None:
    assert errors({"a": torch.cat([torch.zeros(64), torch.ones(64)])}, DataType("nf4"))[
        "scaled_mae"
    ] == pytest.approx(0)


@pytest.mark.parametrize("scale_format", ["dynamic8", "e4m3"])
def test_the_error_of_scales(scale_format: str) -> None:
    of = {"a": torch.randn(64, 512, generator=torch.Generator().manual_seed(0))}
    held = DataType("nf4", double_quant=True, scale_format=scale_format)
    exact = quantize_4bit(of["a"], double_quant=False).absmax
    # The largest weight of a block decodes to its scale, with its sign.
    q = quantize_4bit(of["a"], scale_format=scale_format)
    restored = dequantize_4bit(q).view(-1, 64).abs().amax(1)
    assert scale_error(of, held) == pytest.approx(relative_rmse(restored, exact), rel=1e-5)
    assert scale_error(of, DataType("nf4")) == 0


def test_the_front_has_what_nothing_beats() -> None:
    points = [{"bits": b, "rmse": e} for b, e in ((4, 5), (5, 3), (5, 4), (6, 3), (7, 1), (4, 6))]
    assert [(p["bits"], p["rmse"]) for p in front(points)] == [(4, 5), (5, 3), (7, 1)]


def test_five_sentences_whatever_comes(tmp_path: Path) -> None:
    result = beyond.passing()
    changed = copy.deepcopy(result)
    change("definitions", "64", "least_absolute", to=0.04)(changed)
    change("normal", "64", "af4", "mse", to=1.0)(changed)
    assert not errata(result)
    assert "0.040 in blocks of 64" in errata(changed)[0]
    for found in (result, changed):
        assert len(lessons(found)) == 5
        for sentence in lessons(found):
            assert sentence.endswith(".")
            assert ". " not in sentence
    assert "values are those" in lessons(result)[0]
    assert "values are not those" in lessons(changed)[0]
    assert "does not depend" in lessons(result)[1]
    assert "better depends" in lessons(changed)[1]
    assert "least squared error, free" in section(result)
    assert all(path.stat().st_size > 1000 for path in plots(result, tmp_path).values())
