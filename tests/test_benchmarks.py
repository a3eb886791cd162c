"""The benchmarks: what is timed and what is refused, the statistics, and the files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, results
from benchmarks.harness import Case, Contender, Measurement, Settings, Timing, measure, percentile
from tests import stored

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

    def inputs(seed: int) -> Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(seed))

    return Case("doubling", "3", {"n": 3, "dtype": "float32"}, inputs, contenders, **settings)


def contender(name: str, prepare: Any, *requires: str) -> Contender:
    def check(x: Tensor, result: Tensor) -> None:
        if not torch.equal(result, 2 * x):
            raise AssertionError("not twice the input\nand more")

    return Contender(name, prepare, check, requires)


def scripted(
    ours: list[float], peer: list[float], settings: Settings, **case: Any
) -> tuple[Measurement, FakeClock]:
    """Measure two contenders whose rounds take these seconds."""
    clock = FakeClock({"ours": iter(ours), "peer": iter(peer)})
    pair = [contender(name, doubled(clock, name)) for name in NAMES]
    return measure(doubling(*pair, **case), settings, clock), clock


def record(*measured: Measurement, **ceilings: Any) -> dict[str, Any]:
    result = results.begin(QUICKLY, CPU, ceilings)
    return result | {"cases": [results.case_record(one) for one in measured]}


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
    less = Contender("less", doubled(factor=1.0), None)
    measured = measure(doubling(contender("ours", doubled()), less), QUICKLY, lambda call: 1.0)
    assert measured.timings[1].status == "timed"
    assert measured.timings[1].is_yardstick


def test_who_fails_in_a_round_is_listed_and_the_others_go_on() -> None:
    def breaks_later(x: Tensor) -> Callable[[], Tensor]:
        left = iter(range(3))  # one to be checked, one to warm up, one round

        def call() -> Tensor:
            if next(left, None) is None:
                raise RuntimeError("out of memory\nand so on")
            return 2 * x

        return call

    case = doubling(contender("ours", doubled()), contender("breaks", breaks_later))
    settings = Settings(seconds=100.0, min_rounds=4, max_rounds=4)
    ours, broken = measure(case, settings).timings
    assert (ours.status, ours.rounds) == ("timed", 4)
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: out of memory")
    assert (broken.rounds, broken.p50_ms) == (0, None)


def test_a_case_without_inputs_failed() -> None:
    case = replace(doubling(contender("ours", doubled())), inputs=no_inputs)
    (ours,) = measure(case, QUICKLY).timings
    assert (ours.status, ours.reason) == ("failed", "inputs: MemoryError: too large")


def no_inputs(seed: int) -> Tensor:
    raise MemoryError("too large")


def test_autograd_is_on_where_gradients_are_asked_for() -> None:
    for gradients in (True, False):
        seen: set[bool] = set()

        def prepare(x: Tensor, seen: set[bool] = seen) -> Callable[[], Tensor]:
            return lambda: (seen.add(torch.is_grad_enabled()), 2 * x)[1]

        measure(doubling(contender("ours", prepare), gradients=gradients), QUICKLY)
        assert seen == {gradients}


def test_ours_wrong_is_a_failure_and_the_others_are_timed() -> None:
    case = doubling(contender("ours", doubled(factor=0.0)), contender("peer", doubled()))
    measured = measure(case, QUICKLY, lambda call: 1.0)
    result = record(measured)
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


def test_a_slow_contender_sits_out() -> None:
    """Who has used three times the seconds of the case has three samples or more; the others get their seven."""
    settings = Settings(seconds=10.0, min_rounds=7, max_rounds=60)
    for seconds, rounds in ((20.0, 3), (8.0, 4), (4.0, 7)):
        measured, _ = scripted([1.0] * 10, [seconds] * 10, settings)
        assert [timing.rounds for timing in measured.timings] == [7, rounds]


# --- Targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(("target", "met"), [(0.8, True), (1.0, False)])
def test_targets(target: float, met: bool, required: bool) -> None:
    """A target that is missed is marked; it is a failure where it is required."""
    case = {"targets": {"peer": target}, "required": required}
    measured, _ = scripted([1.2] * 2, [1.0] * 2, QUICKLY, **case)
    assert measured.meets_target(measured.timings[1]) is met
    result = record(measured)
    fails = required and not met
    message = "3: peer takes 0.83 x our time, required is at least 1.00"
    assert results.failures(result) == [message] * fails
    verdict = "met" if met else "missed (0.83)"
    assert f"{'required' if required else 'target'} {target:.2f}: {verdict}" in results.table(
        result
    )


def test_a_target_of_who_was_not_timed_is_open() -> None:
    missing = contender("peer", doubled(), "a_package_that_is_not_there")
    case = doubling(contender("ours", doubled()), missing, targets={"peer": 1.3}, required=True)
    result = record(measure(case, QUICKLY, lambda call: 1.0))
    timing = result["cases"][0]["timings"][1]
    assert (timing["target"], timing["meets_target"]) == (1.3, None)
    assert results.failures(result) == []


def test_shares_of_the_ceilings() -> None:
    """2 GB in a second beside a copy of 8 GB/s, and 1 TFLOP beside 4 TFLOP/s."""
    case = {"bytes_moved": 2 * 10**9, "operations": 10**12}
    measured, _ = scripted([1.0] * 2, [1.0] * 2, QUICKLY, **case)
    ceilings = {"copy_gb_per_s": 8.0, "product_tflop_per_s": {"float32": 4.0}}
    result = record(measured, **ceilings)
    shares = results.shares(result["cases"][0], result["ceilings"])
    assert shares == {"copy": pytest.approx(0.25), "product": pytest.approx(0.25)}
    lines = results.table(result).splitlines()
    assert lines[1] == "ceilings: copy 8 GB/s, product in float32 4 TFLOP/s"
    assert lines[4].endswith("25% of copy, 25% of product")
    assert "%" not in lines[5]
    assert results.shares(result["cases"][0], {}) == {}


def test_tokens_and_memory_are_in_the_table() -> None:
    measured, _ = scripted([2.0] * 2, [4.0] * 2, QUICKLY, most_temporary_bytes=64 * 2**20)
    result = record(measured)
    (case,) = result["cases"]
    case["parameters"]["tokens"] = 8192
    for timing in case["timings"]:
        timing["temporary_bytes"] = 65 * 2**20
        timing["peak_bytes"] = 300 * 2**20
    ours, peer = results.table(result).splitlines()[4:6]
    held = "300 MiB with its weights, 65.0 MiB temporary"
    assert ours.endswith(f"4,096 tokens/s, {held} (at most 64: missed)")
    assert peer.endswith(f"2,048 tokens/s, {held}")


# --- Files ------------------------------------------------------------------------------------------


def test_the_record_is_json_and_tells_no_machine_from_another() -> None:
    measured, _ = scripted([1.0] * 2, [2.0] * 2, QUICKLY, targets={"peer": 1.3})
    result = record(measured, copy_gb_per_s=8.0)
    text = json.dumps(result)
    assert json.loads(text) == result
    assert platform.node() not in text
    assert result.keys() == {
        *("schema", "date", "commit", "device", "versions", "settings", "ceilings", "cases"),
        "complete",
    }
    assert result["schema"] == 2
    assert result["ceilings"] == {"copy_gb_per_s": 8.0}
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert {"type", "name", "threads"} <= result["device"].keys()
    assert {"peft", "bitsandbytes", "torchao"} <= result["versions"].keys()
    (case,) = result["cases"]
    assert case.keys() == {
        *("group", "name", "parameters", "input_sets", "clock", "bytes_moved", "operations"),
        *("required", "most_temporary_bytes", "timings"),
    }
    assert case["timings"][1] == {
        "contender": "peer",
        "status": "timed",
        "reason": "",
        "is_yardstick": False,
        "rounds": 1,
        **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), 2000.0),
        "time_over_ours": 2.0,
        "temporary_bytes": None,
        "peak_bytes": None,
        "target": 1.3,
        "meets_target": True,
    }


def test_file_names() -> None:
    assert machine.file_stem({"name": "AMD EPYC(TM) 9", "threads": 2}) == "amd-epyc-tm-9-2-threads"
    assert machine.file_stem({"name": "NVIDIA H100 80GB"}) == "nvidia-h100-80gb"


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"old\.json: schema must be 2; got 0"):
        results.read(path)


def test_the_table_is_aligned() -> None:
    timings = (
        stored.timing("qlora", 10.0),
        stored.timing("bitsandbytes", 20.0),
        stored.timing("copy", 5.0, is_yardstick=True),
        stored.timing("PEFT", None, status="not installed", reason="peft"),
    )
    case = stored.case("dequantize", "1536 x 576, float32", *timings, clock="graph")
    lines = results.table(stored.result(case) | {"ceilings": {}}).splitlines()
    assert lines[1] == "ceilings: not measured"
    assert lines[3] == "dequantize: 1536 x 576, float32, CUDA graph"
    assert lines[5].split() == ["bitsandbytes", "20.00", "20.00", "20.00", "2.00"]
    assert lines[6].endswith("0.50  yardstick")
    assert lines[7].endswith("not installed (peft)")
    assert len({line.index("20.00") for line in lines if "20.00" in line}) == 1
    assert lines[5].index("2.00", 40) + 4 == lines[0].index("time / ours") + len("time / ours")
