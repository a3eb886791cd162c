"""The benchmarks: what is timed and what is refused, the statistics, the files, and every case at a tiny size."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as program
from benchmarks import kernel_cases, machine, plot, results, step_cases, suite
from benchmarks.harness import Case, Contender, Measurement, Settings, Timing, measure, percentile

CPU = torch.device("cpu")
QUICKLY = Settings(seconds=0.0, min_rounds=1, max_rounds=1)
NAMES = ("ours", "peer")


class FakeClock:
    """Runs the call and says that it took what was scripted for whoever ran."""

    def __init__(self, seconds: dict[str, Iterator[float]]) -> None:
        self.seconds, self.ran = seconds, []

    def __call__(self, call: Callable[[], None]) -> float:
        before = len(self.ran)
        call()
        (name,) = set(self.ran[before:])
        return next(self.seconds[name])


def doubled(clock_or_none: FakeClock | None = None, name: str = "", factor: float = 2.0) -> Any:
    """A contender's `prepare` that multiplies by `factor` and tells the clock who ran."""

    def prepare(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            if clock_or_none is not None:
                clock_or_none.ran.append(name)
            return x * factor

        return call

    return prepare


def doubling(*contenders: Contender, **settings: Any) -> Case:
    """The case that asks for twice the input."""

    def check(x: Tensor, tensors: list[Tensor]) -> None:
        if not torch.equal(tensors[0], 2 * x):
            raise AssertionError("not twice the input\nand more")

    def inputs(seed: int) -> Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(seed))

    return Case("doubling", "3", {"n": 3}, inputs, check, contenders, **settings)


def contender(name: str, prepare: Any, *requires: str) -> Contender:
    return Contender(name, prepare, requires, tensors=lambda result: [result])


def scripted(
    ours: list[float], peer: list[float], settings: Settings, **case: Any
) -> tuple[Measurement, FakeClock]:
    """Measure two contenders whose rounds take these seconds."""
    clock = FakeClock({"ours": iter(ours), "peer": iter(peer)})
    pair = [contender(name, doubled(clock, name)) for name in NAMES]
    return measure(doubling(*pair, **case), settings, clock), clock


# --- What is refused --------------------------------------------------------------------------------


def test_a_wrong_contender_is_not_timed() -> None:
    wrong = contender("wrong", doubled(factor=3.0))
    measured = measure(doubling(contender("ours", doubled()), wrong), QUICKLY, lambda call: 1.0)
    ours, refused = measured.timings
    assert ours.status == "timed"
    assert refused == Timing("wrong", "wrong", "not twice the input")
    assert measured.ratio(refused) is None


def test_a_contender_that_raises_or_is_missing_is_listed() -> None:
    def breaks(x: Tensor) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel\nfor this device")

    measured = measure(
        doubling(
            contender("ours", doubled()),
            contender("broken", breaks),
            contender("missing", doubled(), "torch", "a_package_that_is_not_there"),
        ),
        QUICKLY,
        lambda call: 1.0,
    )
    _, broken, missing = measured.timings
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no kernel")
    assert (missing.status, missing.reason) == ("not installed", "a_package_that_is_not_there")


def test_a_yardstick_is_timed_unchecked() -> None:
    less = Contender("less", doubled(factor=1.0), tensors=None)
    measured = measure(doubling(contender("ours", doubled()), less), QUICKLY, lambda call: 1.0)
    assert measured.timings[1].status == "timed"
    assert measured.timings[1].is_yardstick


def test_ours_wrong_is_a_failure_and_the_others_are_timed() -> None:
    case = doubling(contender("ours", doubled(factor=0.0)), contender("peer", doubled()))
    measured = measure(case, QUICKLY, lambda call: 1.0)
    result = results.record([measured], QUICKLY, CPU)
    assert results.failures(result) == ["3: ours wrong: not twice the input"]
    assert [t["time_over_ours"] for t in result["cases"][0]["timings"]] == [None, None]
    assert "wrong (not twice the input)" in results.table(result)


# --- Statistics -------------------------------------------------------------------------------------


def test_percentiles_are_interpolated() -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], 50) == 3.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([0.0, 10.0], 20) == pytest.approx(2.0)
    assert percentile([7.0], 80) == 7.0


def test_medians_and_ratio_leave_out_the_warmup() -> None:
    settings = Settings(seconds=100.0, min_rounds=5, max_rounds=5, warmup_rounds=1)
    measured, _ = scripted([99, 1, 2, 3, 4, 5], [99, 6, 6, 6, 6, 60], settings)
    ours, peer = measured.timings
    assert (ours.rounds, peer.rounds) == (5, 5)
    assert [ours.p20_ms, ours.p50_ms, ours.p80_ms] == pytest.approx([1800, 3000, 4200])
    assert [peer.p20_ms, peer.p50_ms] == pytest.approx([6000, 6000])
    assert measured.ratio(peer) == pytest.approx(2.0)


def test_a_sample_is_the_mean_over_the_input_sets() -> None:
    measured, clock = scripted([6.0] * 2, [3.0] * 2, QUICKLY, input_sets=3)
    assert measured.ours.p50_ms == pytest.approx(2000)
    # Once each to be checked, then three sets in the warm-up and three in the round.
    assert clock.ran.count("ours") == clock.ran.count("peer") == 7


def test_contenders_take_turns() -> None:
    settings = Settings(seconds=100.0, min_rounds=20, max_rounds=20, warmup_rounds=0)
    _, clock = scripted([1.0] * 20, [1.0] * 20, settings)
    rounds = list(zip(clock.ran[2::2], clock.ran[3::2], strict=True))
    assert {tuple(sorted(names)) for names in rounds} == {NAMES}
    assert len(set(rounds)) == 2  # in both orders


def test_rounds_end_when_the_time_is_spent() -> None:
    settings = Settings(seconds=10.0, min_rounds=2, max_rounds=50)
    assert scripted([1.0] * 51, [1.0] * 51, settings)[0].ours.rounds == 5
    assert scripted([9.0] * 51, [9.0] * 51, settings)[0].ours.rounds == 2
    assert scripted([0.0] * 51, [0.0] * 51, settings)[0].ours.rounds == 50


@pytest.mark.parametrize(("limit", "kept"), [(1.35, True), (1.0, False)])
def test_limits(limit: float, kept: bool) -> None:
    measured, _ = scripted([1.2] * 2, [1.0] * 2, QUICKLY, limits={"peer": limit})
    assert measured.keeps_limit(measured.timings[1]) is kept
    result = results.record([measured], QUICKLY, CPU)
    assert results.failures(result) == (
        [] if kept else ["3: ours takes 1.20 x peer, the limit is 1"]
    )
    assert f"limit {limit:g}: {'kept' if kept else 'NOT KEPT'}" in results.table(result)


# --- Files ------------------------------------------------------------------------------------------


@pytest.fixture
def result() -> dict[str, Any]:
    """A fixed result, as it comes out of a file."""

    def timing(name: str, ratio: float | None, **more: Any) -> dict[str, Any]:
        p50 = None if ratio is None else 10 * ratio
        times = {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50, "time_over_ours": ratio, "rounds": 9}
        verdict = {"limit": None, "keeps_limit": None, "is_yardstick": False, "reason": ""}
        return {"contender": name, "status": "timed", **times, **verdict, **more}

    missing = {"status": "not installed", "reason": "peft"}
    case = {
        "group": "dequantize",
        "name": "1536 x 576, float32",
        "parameters": {"n": 1536, "k": 576},
        "input_sets": 8,
        "timings": [
            timing("qlora", 1.0),
            timing("bitsandbytes", 2.0),
            timing("copy", 0.5, is_yardstick=True),
            timing("PEFT", None, **missing),
        ],
    }
    return {
        "schema": results.SCHEMA,
        "commit": "0123456789ab",
        "device": {"type": "cpu", "name": "A CPU", "threads": 2},
        "cases": [case],
    }


def test_the_record_is_json_and_tells_no_machine_from_another() -> None:
    measured, _ = scripted([1.0] * 2, [2.0] * 2, QUICKLY, limits={"peer": 1.0})
    record = results.record([measured], QUICKLY, CPU)
    text = json.dumps(record)
    assert json.loads(text) == record
    assert platform.node() not in text
    assert record.keys() == {
        *("schema", "date", "commit", "device", "versions", "settings", "cases")
    }
    assert record["versions"]["torch"] == torch.__version__
    assert {"type", "name", "threads"} <= record["device"].keys()
    (case,) = record["cases"]
    assert case.keys() == {"group", "name", "parameters", "input_sets", "timings"}
    assert case["timings"][1] == {
        "contender": "peer",
        "status": "timed",
        "reason": "",
        "is_yardstick": False,
        "rounds": 1,
        **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), 2000.0),
        "time_over_ours": 2.0,
        "limit": 1.0,
        "keeps_limit": True,
    }


def test_file_names() -> None:
    assert machine.file_stem({"name": "AMD EPYC(TM) 9", "threads": 2}) == "amd-epyc-tm-9-2-threads"
    assert machine.file_stem({"name": "NVIDIA H100 80GB"}) == "nvidia-h100-80gb"


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"old\.json: schema must be 1; got 0"):
        results.read(path)


def test_the_table_is_aligned(result: dict[str, Any]) -> None:
    lines = results.table(result).splitlines()
    assert lines[2] == "dequantize: 1536 x 576, float32"
    assert lines[4].split() == ["bitsandbytes", "20.00", "20.00", "20.00", "2.00"]
    assert lines[5].endswith("0.50  yardstick")
    assert lines[6].endswith("not installed (peft)")
    assert len({line.index("20.00") for line in lines if "20.00" in line}) == 1
    assert lines[4].index("2.00", 40) + 4 == lines[0].index("time / ours") + len("time / ours")


def test_the_plot_needs_the_file_alone(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "some-cpu.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    assert plot.bars(results.read(path)) == [
        ("dequantize: 1536 x 576, float32", [("bitsandbytes", 2.0, False), ("copy", 0.5, True)])
    ]
    assert program.main(["plot", str(path), "--output", str(tmp_path / "plots")]) == 0
    (png,) = (tmp_path / "plots").iterdir()
    assert png.name == "some-cpu.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_nothing_is_an_error(result: dict[str, Any], tmp_path: Path) -> None:
    result["cases"][0]["timings"][1:] = []
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw(result, tmp_path / "plot.png")


# --- The command line, and every case at a tiny size ------------------------------------------------


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    for word in (*suite.GROUPS, "--only step", "--quick", "static", "plot", "exit status"):
        assert word in text


def test_an_unknown_group_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--only", "step,walk"])
    assert "got walk" in capsys.readouterr().err


def test_static_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Static:
        main = staticmethod(lambda argv: argv)

    monkeypatch.setitem(sys.modules, "benchmarks.static", Static)
    monkeypatch.setattr("benchmarks.static", Static, raising=False)
    assert program.main(["static", "--json"]) == ["--json"]


def test_all_kernel_cases_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours and every peer that is installed: on the same bytes, all are right."""
    monkeypatch.setattr(kernel_cases, "_SHAPES", {"cpu": [(64, 128)]})
    monkeypatch.setattr(kernel_cases, "_TOKENS", {"cpu": (8,)})
    monkeypatch.setattr(suite, "has_fast_bf16", lambda device: True)
    path = tmp_path / "result.json"
    groups = "quantize,dequantize,forward,layer"
    arguments = ["--device", "cpu", "--quick", "--seconds", "0", "--only", groups]
    assert program.main([*arguments, "--output", str(path)]) == 0
    assert path.with_suffix(".png").is_file()
    cases = results.read(path)["cases"]
    assert {case["group"] for case in cases} == set(groups.split(","))
    assert {case["parameters"]["dtype"] for case in cases} == {"float32", "bfloat16"}
    for case in cases:
        assert case["timings"][0]["status"] == "timed"
        assert {timing["status"] for timing in case["timings"]} <= {"timed", "not installed"}
    assert "quantize: 64 x 128, float32" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_runs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """All contenders agree with the fp64 oracle on the gradients of a small Llama."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    monkeypatch.setattr(step_cases, "_SMOLLM2", step_cases._SMOLLM2 | sizes | heads)
    monkeypatch.setattr(step_cases, "LENGTH", 16)
    monkeypatch.setattr(step_cases, "cached_model", lambda: None)
    case = step_cases.step_cases(CPU, [dtype], quick=False)[0]
    assert case.parameters["weights"] == "random"
    timings = measure(case, QUICKLY, lambda call: call() or 1.0).timings
    assert timings[0].status == "timed", timings[0].reason
    assert {timing.status for timing in timings} <= {"timed", "not installed"}, timings
    assert set(case.limits) <= {timing.contender for timing in timings}


def test_a_wrong_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees one wrong entry among all gradients."""
    right = [torch.tensor(1.0), torch.randn(8, 4)]

    inputs = SimpleNamespace(
        dtype=torch.float32, plain=right, oracle=[tensor.double() for tensor in right]
    )
    step_cases._check(inputs, right)
    wrong = right[1].clone()
    wrong[3, 2] *= -1
    with pytest.raises(AssertionError, match="error"):
        step_cases._check(inputs, [right[0], wrong])
    with pytest.raises(AssertionError, match="loss"):
        step_cases._check(inputs, [right[0] * 1.01, right[1]])
