"""The plots: what is drawn of a result, and that files come out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures, plot, roofline, speedups
from benchmarks.figures import Bar, Row
from benchmarks.roofline import Point
from tests.stored import case, converts, multiplies, neither, result, timing

PNG = b"\x89PNG"


# --- Speed-ups --------------------------------------------------------------------------------------


def test_bars_are_the_timed_others_with_their_targets() -> None:
    bars = speedups.bars(result(converts()))
    assert bars == {
        "dequantize": [
            Row(
                "1536 x 576, float32",
                [
                    Bar("bitsandbytes", 1.5, "1.50, aim 1.30", 1.3, False),
                    Bar("copy of as many bytes", 0.25, "0.25, aim 0.90", 0.9, True),
                ],
            )
        ]
    }


def test_a_case_without_others_has_no_bars() -> None:
    alone = case("quantize", "1 x 1", timing("qlora", 10.0))
    assert speedups.bars(result(alone)) == {}


def test_sixty_cases_stand_in_columns_in_order() -> None:
    cases = [case(g, str(i), *multiplies()["timings"]) for g in "abc" for i in range(20)]
    groups = speedups.bars(result(*cases))
    panels = speedups._panels(groups)
    columns = speedups._columns(panels)
    assert len(columns) == 3
    assert [panel for column in columns for panel in column] == panels
    assert [title for title, _ in panels][:3] == ["a", "a, continued", "a, continued"]
    assert [row.case for _, rows in panels for row in rows] == [str(i) for i in range(20)] * 3
    heights = [sum(map(speedups._height, column)) for column in columns]
    assert max(heights) <= 1.3 * min(heights)
    assert all(figures.height(rows) <= speedups._PANEL_ROWS for _, rows in panels)


def test_few_cases_stand_in_one_column() -> None:
    panels = speedups._panels(speedups.bars(result()))
    assert [title for title, _ in panels] == ["dequantize", "layer", "step"]
    assert speedups._columns(panels) == [panels]


# --- Roofline ---------------------------------------------------------------------------------------


def test_points_are_operations_per_byte_and_tflop_per_s() -> None:
    """Of those that did the whole work: not of yardsticks, not of who was not timed."""
    place = {"dtype": "float32", "group": "layer", "x": 40.0}
    assert roofline.points(result()) == [
        Point(contender="qlora", y=pytest.approx(0.08), **place),
        Point(contender="PEFT over bitsandbytes", y=pytest.approx(0.8 / 9), **place),
        Point(contender="LoRA over dense", y=pytest.approx(0.8 / 8.5), **place),
    ]


def test_what_only_moves_bytes_is_held_to_the_copy() -> None:
    rows = roofline.conversions(result())
    assert [(bar.value, bar.text) for bar in rows["dequantize"][0].bars] == [
        (pytest.approx(5.0), "5, 25%"),
        (pytest.approx(10 / 3), "3.33, 17%"),
        (pytest.approx(20.0), "20, 100%"),
    ]
    assert rows.keys() == {"dequantize"}


def test_the_roof_is_a_slope_and_a_flat_line() -> None:
    class Axes:
        drawn = None

        def plot(self, x: list[float], y: list[float], **style: object) -> None:
            self.drawn = (x, y)

        def __getattr__(self, name: str) -> object:
            return lambda *arguments, **more: None

    def roof(ceilings: dict[str, object]) -> tuple[list[float], list[float]] | None:
        axes = Axes()
        roofline._draw_roof(axes, "float32", [Point("float32", "a", "b", 40.0, 0.08)], ceilings)
        return axes.drawn

    both = {"copy_gb_per_s": 20.0, "product_tflop_per_s": {"float32": 0.1}}
    x, y = roof(both)
    assert x[1] == pytest.approx(5.0)  # where 20 GB/s feed 0.1 TFLOP/s
    assert y == pytest.approx([x[0] * 0.02, 0.1, 0.1])
    assert x[0] < 5 < 40 < x[2]
    x, y = roof({"copy_gb_per_s": 20.0, "product_tflop_per_s": {}})
    assert y == pytest.approx([0.02 * value for value in x])
    assert roof({"product_tflop_per_s": {"float32": 0.1}})[1] == [0.1, 0.1]
    assert roof({}) is None


# --- Both -------------------------------------------------------------------------------------------


def test_a_contender_has_one_color_and_ours_its_own() -> None:
    palette = figures.colors(result())
    assert palette["qlora"] == palette["qlora NF4+DQ"]
    others = [color for name, color in palette.items() if not name.startswith("qlora")]
    assert palette["qlora"] not in others
    assert len(set(others)) == len(others) == 6


def test_the_plots_need_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some-cpu.json"
    path.write_text(json.dumps(result()), encoding="utf-8")
    assert plot.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [png.name for png in drawn] == ["some-cpu-roofline.png", "some-cpu.png"]
    assert all(png.read_bytes().startswith(PNG) for png in drawn)
    assert set(capsys.readouterr().out.split()) == set(map(str, drawn))


@pytest.mark.parametrize(
    ("cases", "names"),
    [
        ([neither()], ["a.png"]),
        ([case("b", "c", timing("qlora", 1.0), bytes_moved=9)], ["a-roofline.png"]),
    ],
)
def test_only_what_there_is_is_drawn(cases: list[dict], names: list[str], tmp_path: Path) -> None:
    """Without ceilings, too."""
    stored = result(*cases) | {"ceilings": {}}
    assert [path.name for path in plot.draw(stored, tmp_path / "a.png")] == names
    assert [path.name for path in tmp_path.iterdir()] == names


def test_a_plot_of_nothing_is_an_error(tmp_path: Path) -> None:
    nothing = result(case("step", "alone", timing("qlora", 1.0)))
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw(nothing, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
