"""Appendix F: rows are sorted by kind of layer, and the test finds what is not normal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paper_repro import normality
from paper_repro.normality import kind_of, lessons, plots, section
from tests.paper_results import normality as results


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("encoder.layer.0.attention.output.dense.weight", "attention output"),
        ("encoder.layer.0.attention.self.key.weight", "attention input"),
        ("encoder.layer.0.intermediate.dense.weight", "feed-forward input"),
        ("encoder.layer.0.output.dense.weight", "feed-forward output"),
        ("decoder/layer_1/self_attention/linear_0/weight", "attention input"),
        ("decoder/layer_1/self_attention/linear_1/weight", "attention output"),
        ("decoder/layer_1/attention/linear_1/weight", "attention input"),
        ("decoder/layer_1/attention/linear_2/weight", "attention output"),
        ("decoder/layer_1/ffn/linear_0/weight", "feed-forward input"),
        ("decoder/layer_1/ffn/linear_1/weight", "feed-forward output"),
        ("model.layers.0.self_attn.q_proj.weight", "attention input"),
        ("model.layers.0.self_attn.o_proj.weight", "attention output"),
        ("model.layers.0.mlp.gate_proj.weight", "feed-forward input"),
        ("model.layers.0.mlp.down_proj.weight", "feed-forward output"),
    ],
)
def test_kinds_of_layers(key: str, kind: str) -> None:
    assert kind_of(key) == kind


def test_a_name_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"key must .*'pooler\.dense"):
        kind_of("pooler.dense.weight")


def test_heavy_tails_are_found_and_normal_rows_are_not() -> None:
    generator = torch.Generator().manual_seed(1)
    heavy = normality._count((torch.randn(200, 256, generator=generator) ** 3).unbind(), 100)
    assert heavy["rows"] == 200
    assert heavy["tested"] == heavy["weights"]["row"] == heavy["bonferroni"]["weights"] == 100
    assert heavy["weights"]["block"] > 90
    normal = normality._count(torch.randn(400, 256, generator=generator).unbind(), None)
    assert normal["tested"] == 400
    for source in ("weights", "control"):
        assert 4 <= normal[source]["row"] <= 40
        assert normal["bonferroni"][source] <= 3


def test_a_kind_counts_by_its_rows() -> None:
    def kind(rows: int, rejected: int) -> dict[str, object]:
        return {"rows": rows, "tested": 10, "weights": {"row": rejected}}

    assert normality._share({"a": kind(900, 10), "b": kind(100, 0)}, "weights") == 0.9


def test_it_is_shown(tmp_path: Path) -> None:
    result = results.passing()
    assert "MiniLM" in section(result)
    assert len(lessons(result)) == 1
    assert all(path.stat().st_size > 1000 for path in plots(result, tmp_path).values())
