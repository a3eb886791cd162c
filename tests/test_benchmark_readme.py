"""README's section on speed: what is written of a result, and that it is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme, results
from tests.stored import case, converts, multiplies, result, timing


def cells(text: str, start: str) -> list[str]:
    """The cells of the one row whose first cell starts like this."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return row.strip("| ").split(" | ")


def test_readme_says_what_is_stored() -> None:
    """Else run `python -m benchmarks readme`."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text, readme.section(readme.stored())) == text


def test_a_row_has_ratios_targets_and_the_ceiling() -> None:
    text = readme.section({"a-cpu": result()})
    assert cells(text, "dequantize:") == [
        "dequantize: 1536 x 576, float32",
        "10 ms",
        "bitsandbytes 1.50 (≥ 1.3), ***copy of as many bytes 0.25 (< 0.9)***",
        "25% of copy",
    ]
    assert cells(text, "layer:")[2:] == [
        "**PEFT over bitsandbytes 0.90 (< 1)**, LoRA over dense 0.85, *dense products alone 0.80*",
        "80% of product",
    ]
    assert cells(text, "step")[1:] == ["1,000 ms", "LoRA over dense 0.95 (≥ 0.74)", "-"]


def test_the_heading_names_device_commit_and_versions() -> None:
    text = readme.section({"a-cpu": result(), "a-gpu": result(device="cuda")})
    assert "**A CPU, 2 threads**, commit `0123456789ab`, 2026-01-02" in text
    assert "**A GPU, 700 W**" in text
    assert "Python 3.12.1, torch 2.11.0, triton 3.6.0; without torchao." in text
    assert "[data](benchmarks/results/a-cpu.json)" in text


def test_what_went_wrong_is_said() -> None:
    bad = case(
        "forward",
        "8 x 8",
        timing("qlora", None, status="wrong", reason="error"),
        timing("bitsandbytes", None, status="failed", reason="no kernel", target=1.3),
        timing("torchao", None, status="not installed", target=1.3),
        timing("PEFT", None, status="not installed"),
    )
    assert cells(readme.section({"a": result(bad)}), "forward")[1:] == [
        "**wrong**",
        "bitsandbytes failed (≥ 1.3), torchao not installed (≥ 1.3)",
        "-",
    ]


def test_without_a_gpu_every_target_is_not_measured() -> None:
    for found in ({}, {"a-cpu": result()}):
        text = readme.section(found)
        assert "no CUDA device has been measured" in text
        rows = [line for line in text.splitlines() if line.endswith("| not measured |")]
        assert len(rows) == len(readme.CUDA_TARGETS)
        assert "nan" not in text


def test_with_a_gpu_its_own_targets_stand_there() -> None:
    fast, slow = converts(), multiplies()
    fast["timings"][0]["temporary_bytes"], slow["timings"][0]["temporary_bytes"] = 1, 65 * 10**6
    text = readme.section({"a-gpu": result(fast, converts(), slow, device="cuda")})
    assert "not measured" not in text
    assert cells(text, "dequantize | bitsandbytes")[2:] == ["1.3", "1.50 to 1.50", "2 of 2"]
    assert cells(text, "dequantize | copy")[2:] == ["0.9", "0.25 to 0.25", "0 of 2"]
    assert cells(text, "all | temporary")[2:] == ["64 MB", "65 MB at most", "1 of 2"]


def test_a_target_against_a_peer_that_is_missing_is_not_measured() -> None:
    lonely = case(
        "decode",
        "8 x 8",
        timing("qlora", 1.0),
        timing("bitsandbytes", None, status="not installed", target=1.3),
    )
    text = readme.section({"a-gpu": result(lonely, device="cuda")})
    assert cells(text, "decode | bits")[2:] == ["1.3", "not measured", "not measured"]


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(1849.88, "1,850 ms"), (12.345, "12.3 ms"), (0.0443, "44.3 µs"), (0.5, "500 µs")],
)
def test_times(milliseconds: float, words: str) -> None:
    assert readme._time(milliseconds) == words


# --- Files ------------------------------------------------------------------------------------------


def test_quick_runs_and_older_layouts_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.json").write_text(json.dumps(result()), encoding="utf-8")
    (tmp_path / "a-quick.json").write_text(json.dumps(result()), encoding="utf-8")
    (tmp_path / "old.json").write_text('{"schema": 0}', encoding="utf-8")
    assert readme.stored(tmp_path) == {"b": result()}
    assert f"old.json: schema must be {results.SCHEMA}; got 0" in capsys.readouterr().err


def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(readme, "README", path)
    monkeypatch.setattr(readme, "stored", dict)
    assert readme.main(["--check"]) == 1
    assert "old" in path.read_text(encoding="utf-8")
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    text = path.read_text(encoding="utf-8")
    assert text == f"before\n{readme.BEGIN}\n{readme.section({})}\n{readme.END}\nafter\n"


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END, readme.END + readme.BEGIN])
def test_missing_markers_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="must have the lines <!-- benchmarks: begin -->"):
        readme.updated(text, "new")
