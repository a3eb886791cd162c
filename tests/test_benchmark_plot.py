"""The plots: what is drawn of a result, and that files come out of it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figures, plot, roofline, speedups, suite
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
                    Bar(
                        *("copy of as many bytes (yardstick)", 0.25, "0.25, aim 0.90", 0.9),
                        missed=True,
                        is_yardstick=True,
                    ),
                ],
            )
        ]
    }


def test_a_case_without_others_has_no_bars() -> None:
    alone = case("quantize", "1 x 1", timing("qlora", 10.0))
    assert speedups.bars(result(alone)) == {}


@pytest.mark.parametrize(
    ("bars", "shown"),
    [
        ([Bar("a", 1.1, "")], (0.8, 1.25)),
        ([Bar("a", 0.01, ""), Bar("b", 80.0, "")], (0.01 / 1.1, 88.0)),
        ([Bar("a", 1.1, "", aim=3.0)], (0.8, 3.3)),
        ([Bar("a", 0.01, "", is_yardstick=True)], (0.25 / 1.1, 1.25)),
        ([Bar("a", 90.0, "", is_yardstick=True)], (0.8, 4.4)),
        ([Bar("a", 0.5, "", is_yardstick=True)], (0.5 / 1.1, 1.25)),
        ([Bar("a", 0.01, "", aim=0.1, is_yardstick=True)], (0.1 / 1.1, 1.25)),
    ],
)
def test_the_scale_holds_all_but_far_yardsticks(bars: list[Bar], shown: tuple) -> None:
    assert speedups.limits([Row("case", bars)]) == pytest.approx(shown)


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
        Point(contender="qlora", y=pytest.approx(0.08), m=512, **place),
        Point(contender="PEFT over bitsandbytes", y=pytest.approx(0.8 / 9), **place),
        Point(contender="LoRA over dense", y=pytest.approx(0.8 / 8.5), **place),
    ]


def test_each_number_of_tokens_is_written_once() -> None:
    """And none where the next would be written over it."""
    x_and_m = [(8.0, 16), (9.0, 16), (1.0, 16), (99.0, None), (2.0, 1), (8.5, 32)]
    chosen = [Point("float32", "a", "b", x, 1.0, m) for x, m in x_and_m]
    assert roofline.labelled(chosen) == [chosen[1], chosen[4]]


def test_a_case_has_room_for_its_name() -> None:
    rows = [Row("a", [Bar("b", 1.0, "")] * count) for count in (1, 2, 5)]
    assert [figures.height([row]) for row in rows] == [3, 3, 6]
    assert figures.height(rows) == 12


@pytest.mark.parametrize(
    ("device", "line"), [("cpu", "large copy (out of cache)"), ("cuda", "copy")]
)
def test_the_line_of_a_copy_says_what_was_copied(device: str, line: str) -> None:
    assert roofline._copy(result(device=device)) == line


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

    def roof(ceilings: dict[str, object], y: float = 8.0) -> tuple[Any, str]:
        axes, chosen = Axes(), [Point("float32", "a", "b", 40.0, y)]
        title = roofline._draw_roof(axes, chosen, ceilings, "copy", roofline._unit(chosen))
        return axes.drawn, title

    (x, y), title = roof({"copy_gb_per_s": 2000.0, "product_tflop_per_s": {"float32": 10.0}})
    assert x[1] == pytest.approx(5.0)  # where 2000 GB/s feed 10 TFLOP/s
    assert y == pytest.approx([x[0] * 2, 10, 10])
    assert x[0] < 5 < 40 < x[2]
    assert title == "float32, copy 2,000 GB/s, dense product 10 TFLOP/s"
    (x, y), _ = roof({"copy_gb_per_s": 2000.0, "product_tflop_per_s": {}})
    assert y == pytest.approx([2 * value for value in x])
    assert roof({"product_tflop_per_s": {"float32": 10.0}})[0][1] == [10.0, 10.0]
    assert roof({}) == (None, "float32")
    (x, y), title = roof({"copy_gb_per_s": 20.0, "product_tflop_per_s": {"float32": 0.1}}, 0.08)
    assert y == pytest.approx(
        [x[0] * 20, 100, 100]
    )  # all in GFLOP/s where no point reaches a TFLOP/s
    assert title == "float32, copy 20 GB/s, dense product 100 GFLOP/s"


# --- Both -------------------------------------------------------------------------------------------


def test_a_contender_has_one_color_and_ours_its_own() -> None:
    palette = figures.colors(result())
    others = [color for name, color in palette.items() if name != "qlora"]
    assert len(set(others) - {palette["qlora"]}) == len(others) == 6
    assert "dense products alone (yardstick)" in palette


def test_a_peer_has_one_color_in_layers_and_in_whole_models() -> None:
    whole = case(
        "step", "a", timing("qlora NF4+DQ", 1.0), timing("PEFT over bitsandbytes NF4+DQ", 1)
    )
    palette = figures.colors(result(multiplies(), whole))
    assert [name for name in palette if "PEFT" in name] == ["PEFT over bitsandbytes"]
    assert "qlora NF4+DQ" not in palette


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_all_that_compete_have_colors_of_their_own(kind: str) -> None:
    dtypes = [torch.float32, torch.bfloat16] if kind == "cpu" else [torch.bfloat16]
    cases = suite.all_cases(torch.device(kind), dtypes, list(suite.GROUPS), quick=False)
    palette = figures.colors(
        result(
            *(
                case(
                    c.group,
                    c.name,
                    *(timing(x.name, 1.0, is_yardstick=x.is_yardstick) for x in c.contenders),
                )
                for c in cases
            )
        )
    )
    others = {label: color for label, color in palette.items() if color != figures._OURS}
    assert len(others) >= 10
    assert len(set(others.values())) == len(others)


def test_long_names_are_broken_after_commas() -> None:
    name = "28672 x 8192, bfloat16, 2048 tokens, rank 64, dropout 0.05"
    lines = figures._wrapped(name).replace("\N{NO-BREAK SPACE}", " ").split("\n")
    assert lines == ["28672 x 8192, bfloat16, 2048 tokens,", "rank 64, dropout 0.05"]


@pytest.mark.parametrize(
    ("value", "words"),
    [(1849.88, "1,850"), (100.0, "100"), (12.345, "12.3"), (0.01384, "0.0138"), (9.0, "9")],
)
def test_numbers_have_three_digits_or_more(value: float, words: str) -> None:
    assert figures.digits(value) == words


def test_the_plots_need_the_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some-cpu.json"
    path.write_text(json.dumps(result()), encoding="utf-8")
    assert plot.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [png.name for png in drawn] == ["some-cpu-roofline.png", "some-cpu.png"]
    assert all(png.read_bytes().startswith(PNG) for png in drawn)
    assert set(capsys.readouterr().out.split()) == set(map(str, drawn))


def test_a_file_that_cannot_be_drawn_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are drawn all the same."""
    (tmp_path / "old.json").write_text('{"schema": 0}', encoding="utf-8")
    (tmp_path / "text.json").write_text("text", encoding="utf-8")
    (tmp_path / "good.json").write_text(json.dumps(result(neither())), encoding="utf-8")
    names = ["missing.json", "old.json", "text.json", "good.json"]
    files = [str(tmp_path / name) for name in names]
    assert plot.main([*files, "--output", str(tmp_path / "plots")]) == 2
    assert [png.name for png in (tmp_path / "plots").iterdir()] == ["good.png"]
    missing, old, text = capsys.readouterr().err.splitlines()
    assert missing == f"not drawn: {tmp_path / 'missing.json'}: no such file"
    assert "old.json: schema must be" in old
    assert "text.json: not valid JSON" in text


def test_without_matplotlib_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def blocked(name: str, *arguments: Any, **more: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **more)

    path = tmp_path / "a.json"
    path.write_text(json.dumps(result()), encoding="utf-8")
    monkeypatch.setattr(builtins, "__import__", blocked)
    assert plot.main([str(path), "--output", str(tmp_path)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err


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
