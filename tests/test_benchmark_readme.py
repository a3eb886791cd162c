"""README's section on speed: what is written of a result, and that it is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import readme, results
from benchmarks.harness import Settings
from tests.stored import case, converts, multiplies, result, timing


def cells(text: str, start: str) -> list[str]:
    """The cells of the one row whose first cell starts like this."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return row.strip("| ").split(" | ")


def test_readme_says_what_is_stored() -> None:
    """Else run `python -m benchmarks readme`."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text, readme.section(readme.stored())) == text


def test_what_the_tests_read_is_laid_out_as_what_is_stored() -> None:
    assert result().keys() == results.begin(Settings(), torch.device("cpu"), {}).keys()
    for recorded in readme.unmeasured():
        assert converts().keys() == recorded.keys()
        for one in recorded["timings"]:
            assert timing("a", 1.0).keys() == one.keys()


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
    assert cells(readme.section({"a": result(bad)}), "forward: 8 x 8")[1:] == [
        "**wrong**",
        "bitsandbytes failed (≥ 1.3), torchao not installed (≥ 1.3)",
        "-",
    ]


def test_without_a_gpu_every_target_is_not_measured() -> None:
    for found in ({}, {"a-cpu": result()}):
        text = readme.section(found)
        assert "no CUDA device has been measured" in text
        rows = [line for line in text.splitlines() if "| not measured | not measured |" in line]
        assert len(rows) >= 15
        for start, target in {
            "forward, 1 token | dense": "3.2",
            "forward, 2 to 16 tokens | dense": "2.5",
            "decoder, 8192 tokens | PEFT over bitsandbytes": "1.3",
            "decoder, peak memory | PEFT over bitsandbytes": "1",
            "temporary memory, any shape | -": "64 MiB",
        }.items():
            assert cells(text, start)[2:] == [target, "not measured", "not measured"]
        assert "nan" not in text


def test_with_a_gpu_its_own_targets_stand_there() -> None:
    text = readme.section({"a-gpu": result(converts(), converts(), multiplies(), device="cuda")})
    assert "not measured" not in text
    assert cells(text, "dequantize | bitsandbytes")[2:] == ["1.3", "1.50", "2 of 2"]
    assert cells(text, "dequantize | copy")[2:] == ["0.9", "0.25", "0 of 2"]
    assert cells(text, "layer, 512 tokens | PEFT")[2:] == ["1", "0.90", "0 of 1"]
    assert "memory, " not in text


def test_cases_that_aim_at_the_same_share_a_row() -> None:
    def decode(m: int, peer_ms: float | None, target: float) -> dict:
        status = "failed" if peer_ms is None else "timed"
        peer = timing("dense", peer_ms, 1.0, target=target, status=status)
        ours = timing("qlora", 1.0, 1.0)
        return case("forward", str(m), ours, peer, parameters={"dtype": "bfloat16", "m": m})

    cases = [decode(1, 3.0, 3.2), decode(2, 2.6, 2.5), decode(4, 2.0, 2.5), decode(16, None, 2.5)]
    text = readme.section({"a-gpu": result(*cases, device="cuda")})
    assert cells(text, "forward, 1 token | dense")[2:] == ["3.2", "3.00", "0 of 1"]
    # The one that failed counts among those that do not meet it.
    assert cells(text, "forward, 2 to 16 tokens | dense")[2:] == ["2.5", "2.00 to 2.60", "1 of 3"]


def test_only_cases_that_bound_temporary_memory_count() -> None:
    most = 64 * 2**20
    small, large, free = (multiplies() | {"most_temporary_bytes": n} for n in (most, most, None))
    for one, held in ((small, most), (large, most + 2**20), (free, 2**40)):
        one["timings"][0]["temporary_bytes"] = held
    text = readme.section({"a-gpu": result(small, large, free, device="cuda")})
    assert cells(text, "temporary memory")[2:] == ["64 MiB", "65 MiB at most", "1 of 2"]


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome"),
    [
        (4 * 10**9, 5 * 10**9, ["1.25", "1 of 1"]),
        (4 * 10**9, 2 * 10**9, ["0.50", "0 of 1"]),
        (None, 5 * 10**9, ["not measured", "not measured"]),
    ],
)
def test_a_decoder_layer_is_held_to_the_memory_of_its_peer(
    ours: int | None, theirs: int, outcome: list[str]
) -> None:
    layer = case(
        "decoder",
        "a layer",
        timing("qlora", 10.0, peak_bytes=ours),
        timing("PEFT over bitsandbytes", 15.0, target=1.3, peak_bytes=theirs),
        timing("PEFT over dense", 15.0, peak_bytes=1),
    )
    text = readme.section({"a-gpu": result(layer, device="cuda")})
    assert cells(text, "decoder, peak memory")[1:] == ["PEFT over bitsandbytes", "1", *outcome]


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


def test_partial_runs_and_older_layouts_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.json").write_text(json.dumps(result()), encoding="utf-8")
    partial = result() | {"complete": False}
    (tmp_path / "b-layer.json").write_text(json.dumps(partial), encoding="utf-8")
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
